"""Erase a person: their words, what they said of others' answers, and the rows of datasets that rest on either.

The order lets a killed erasure be asked for again: first the ledger's line, then the cleaned datasets, then the rows, then
folders and the database's free pages. What was found is told by counts; a second erasure finds nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import ConflictError
from pairloop.loop import cycle
from pairloop.loop.privacy import cleaning, folders, ledger
from pairloop.loop.privacy.ledger import Entry
from pairloop.loop.privacy.people import ids_of
from pairloop.store import Store, audit, cycles, datasets, erasures, operators, removed, runs, stored, versions
from pairloop.store.audit import SCHEDULER, AuditAction
from pairloop.store.erasures import Erasure, Found
from pairloop.store.groups import chunked
from pairloop.store.removed import Why
from pairloop.store.schema import runs as run_table
from pairloop.store.subjects import as_people
from pairloop.types import CycleState, Run, RunStatus

logger = logging.getLogger(__name__)

_BUILDS = (CycleState.BUILDING, CycleState.TRAINING, CycleState.CHECKING)


@dataclass(frozen=True, slots=True)
class Effect:
    """What an erasure took, or would take: ``counts`` by noun, ``datasets`` → what is left of each (itself in a preview),
    ``versions`` that had seen the person → of how many rows. ``erasure_id`` None: nothing was done. ``is_scrubbed``: whether
    the bytes are gone from the database's file, too."""

    erasure_id: str | None
    counts: Mapping[str, int]
    datasets: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    is_scrubbed: bool = False
    created_at: datetime | None = None

    @property
    def is_empty(self) -> bool:
        return not any(self.counts.values())


def preview(store: Store, config: Config, person: str) -> Effect:
    """What `erase` would take; nothing is changed."""
    with store.reading() as c:
        found = erasures.find(c, ids_of(store, config, person))
        seen = erasures.rows_by_version(c, found.pair_ids)
        live = [dataset_id for dataset_id in found.dataset_ids if _is_live(c, dataset_id)]
    return Effect(None, _counts(found), {name: name for name in live}, _named(seen))


def erase(store: Store, config: Config, person: str, *, reason: str, actor: str = SCHEDULER) -> Effect:
    """Erase everything of ``person`` (a user, or a rater); see `Effect`. Without anything to erase nothing is recorded.

    ConflictError while a cycle builds, trains or measures: nothing is changed then. No cycle begins meanwhile.
    """
    subjects, reason = ids_of(store, config, person), store.kept_words(reason)
    found, policies = _look(store, subjects)
    if found.is_empty:
        folders.clear(store, config)  # of an erasure that was killed after its rows
        return Effect(None, _counts(found))
    with cycle.standstill(store, config, policies):
        found, _ = _look(store, subjects)  # what was compiled since
        entry = ledger.entry_about(subjects, reason)
        ledger.append(config, entry)
        return _erase(store, config, entry, subjects, found, actor)


def _look(store: Store, subjects: Sequence[str]) -> tuple[Found, list[str]]:
    """What there is of them, and the policies that may work with it; ConflictError where one does."""
    with store.reading() as c:
        found = erasures.find(c, subjects)
        operators.refuse_while_active(c, subjects)
        _refuse_while_in_use(c, found)
        return found, versions.policies(c)


def reapply(store: Store, config: Config, entries: Sequence[Entry]) -> dict[str, int]:
    """Erase again what came back with a backup: call it after a restore, with the ledger as it was before. Counts by noun.

    Nobody serves or trains on the store meanwhile.
    """
    total: dict[str, int] = {"erasures": 0}
    with store.reading() as c:
        everybody = {name: ids_of(store, config, name) for name in erasures.people(c)}
    for entry in entries:
        if entry.group_id is not None:
            group_id = entry.group_id
            total["completions"] = total.get("completions", 0) + store.write(lambda c, g=group_id: _delete(c, g))  # type: ignore[misc]
            continue
        subjects = _subjects(entry, everybody)
        with store.reading() as c:
            found = erasures.find(c, subjects)
        if not found.is_empty:
            effect = _erase(store, config, entry, subjects, found, SCHEDULER)
            total["erasures"] += 1
            for noun, count in effect.counts.items():
                total[noun] = total.get(noun, 0) + count
    if any(total.values()):
        store.scrub()
    return total


def _subjects(entry: Entry, everybody: Mapping[str, tuple[str, ...]]) -> list[str]:
    """All ids of whom the entry is about. A database's row has the hash of one of their ids alone."""
    if len(entry.hashes) > 1:
        return [name for name in everybody if entry.is_about(name)]
    found = (ids for ids in everybody.values() if any(map(entry.is_about, ids)))
    return list(dict.fromkeys(name for ids in found for name in ids))


def delete_completion(store: Store, config: Config, group_id: str) -> bool:
    """Erase one stored completion, so that no backup brings it back; False where there is none."""
    with store.reading() as c:
        if stored.get(c, group_id) is None:
            return False
    ledger.append(config, ledger.entry_about_completion(group_id))
    return store.write(lambda c: _delete(c, group_id))


def _delete(c: Connection, group_id: str) -> bool:
    return stored.delete(c, group_id, datetime.now(UTC))


def _erase(store: Store, config: Config, entry: Entry, subjects: Sequence[str], found: Found, actor: str) -> Effect:
    with store.reading() as c:
        seen = erasures.rows_by_version(c, found.pair_ids)
        live = [dataset for name in found.dataset_ids if _is_live(c, name) and (dataset := datasets.get(c, name)) is not None]
    if found.quarantines:
        cleaning.forget_quarantined(store, as_people(subjects))
    successors = {}
    for dataset in live:
        left, _ = cleaning.without(
            store, dataset, lambda row: row.row_id in found.pair_ids, feedback_ids=frozenset(found.feedback_ids)
        )
        successors[dataset.dataset_id] = left.dataset_id
    record = Erasure(entry.erasure_id, entry.salt, entry.hashes[-1], entry.reason, _counts(found), entry.created_at)

    def forget(c: Connection) -> None:
        erasures.insert(c, record)
        counts = record.counts
        audit.record(c, AuditAction.ERASE, actor=actor, subject=entry.erasure_id, reason=entry.reason, details=counts)
        for (policy, number), rows in seen.items():
            erasures.mark(c, policy, number, entry.erasure_id, rows)
        for dataset in live:
            if successors[dataset.dataset_id] != dataset.dataset_id:
                left = successors[dataset.dataset_id]
                removed.mark(c, dataset.path, Why.ERASURE, datetime.now(UTC), successor=left)
        erasures.forget_pairs(c, found.pair_ids)
        erasures.forget_decisions(c, subjects, entry.created_at)

    store.write(forget)
    _erase_rows(store, found)
    is_scrubbed = store.scrub()  # first: folders may lie at a URL that is away, and another call clears them
    folders.clear(store, config)
    logger.info("erasure %s: %s", entry.erasure_id, dict(record.counts))  # never who
    return Effect(entry.erasure_id, record.counts, successors, _named(seen), is_scrubbed, entry.created_at)


def _erase_rows(store: Store, found: Found) -> None:
    """In short transactions, so that a server beside goes on answering."""
    now = datetime.now(UTC)
    for ids in chunked(found.group_ids):
        store.write(lambda c, ids=ids: erasures.erase_groups(c, ids, now))  # type: ignore[misc]
    for ids in chunked(found.feedback_ids):
        store.write(lambda c, ids=ids: erasures.erase_feedback(c, ids))  # type: ignore[misc]


def _refuse_while_in_use(c: Connection, found: Found) -> None:
    """A cycle that has read the rows would train on them after they are gone, and nothing would say so."""
    for policy in versions.policies(c):
        current = cycles.current(c, policy)
        if current is None or current.state not in _BUILDS:
            continue
        record = current.record(CycleState.TRAINING)
        if record is None or record["dataset_id"] in found.dataset_ids:
            raise ConflictError(
                f"cycle {current.number} of {policy} is {current.state} with rows of theirs; erase when it duels or has ended "
                "(`pairloop cycle status`)"
            )
    busy = [run for run in _runs_on(c, found.dataset_ids) if run.status is RunStatus.RUNNING]
    if any(run.lease_expires_at > datetime.now(UTC) for run in busy):
        raise ConflictError(f"run {busy[0].run_id} trains on rows of theirs; erase when it has ended")


def _runs_on(c: Connection, dataset_ids: Collection[str]) -> list[Run]:
    ids = c.execute(sa.select(run_table.c.run_id).where(run_table.c.dataset_id.in_(dataset_ids))).scalars().all()
    return [run for run_id in ids if (run := runs.get(c, run_id)) is not None]


def _is_live(c: Connection, dataset_id: str) -> bool:
    dataset = datasets.current(c, dataset_id)
    return dataset is not None and dataset.dataset_id == dataset_id


def _counts(found: Found) -> dict[str, int]:
    return {
        "groups": len(found.group_ids),
        "feedback": len(found.feedback_ids),
        "training_rows": len(found.pair_ids),
        "quarantines": found.quarantines,
        "traces": found.traces,
    }


def _named(seen: Mapping[tuple[str, int], int]) -> dict[str, int]:
    return {f"{policy}@{number}": rows for (policy, number), rows in sorted(seen.items())}
