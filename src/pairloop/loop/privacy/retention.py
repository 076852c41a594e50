"""Retention: texts, and datasets that hold them, go after ``privacy.keep_days``; weights nobody needs beyond ``keep_versions``.

What stays of a text is what a deletion leaves: who answered, labels and numbers, lineage. A version whose dataset is gone
cannot be rebuilt any more. A small batch at a time, so that no pick waits for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.loop.privacy import folders
from pairloop.store import Store, audit, cycles, datasets, jobs, removed, runs, stored, versions
from pairloop.store.audit import SCHEDULER, AuditAction
from pairloop.store.groups import ERASED_HASH
from pairloop.store.removed import Why
from pairloop.store.schema import dataset_pairs, pair_groups, removed_artifacts
from pairloop.store.schema import datasets as dataset_table
from pairloop.store.schema import groups as group_table
from pairloop.types import BASE_VERSION, Alias, Dataset, Version

BATCH = 100
"""Groups whose texts are erased in one transaction: a few milliseconds of the writer."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What went, or would go: groups whose texts are too old, datasets, and versions' weights (by their names)."""

    groups: int = 0
    datasets: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.groups or self.datasets or self.versions)


def due(store: Store, config: Config, *, now: datetime | None = None) -> Swept:
    """What a sweep would take now; nothing is changed."""
    now = now or datetime.now(UTC)
    with store.reading() as c:
        before = _cutoff(config, now)
        count = 0 if before is None else c.execute(sa.select(sa.func.count()).select_from(_old(before).subquery())).scalar_one()
        old = [] if before is None else _old_datasets(c, before)
        spare = _spare_versions(c, config)
    return Swept(count, tuple(dataset.dataset_id for dataset in old), tuple(version.name for version in spare))


def sweep(store: Store, config: Config, *, actor: str = SCHEDULER, now: datetime | None = None) -> Swept:
    """Take what is due. Datasets go first: a text must not outlive its erasure in one of them."""
    now = now or datetime.now(UTC)
    before = _cutoff(config, now)
    with store.reading() as c:
        old = [] if before is None else _old_datasets(c, before)
        spare = _spare_versions(c, config)

    def mark(c: Connection) -> tuple[list[Dataset], list[Version]]:
        """Looked at again: what became needed meanwhile stays, and what is marked is refused from now on."""
        old = [] if before is None else _old_datasets(c, before)
        spare = _spare_versions(c, config)
        for path in [*(dataset.path for dataset in old), *(version.path for version in spare)]:
            removed.mark(c, path, Why.RETENTION, now)
        return old, spare

    if old or spare:
        old, spare = store.write(mark)
    folders.clear(store, config)  # also what a call that was killed has left
    groups = 0
    while before is not None and (done := store.write(lambda c: _erase_some(c, before, now))):
        groups += done
    swept = Swept(groups, tuple(dataset.dataset_id for dataset in old), tuple(version.name for version in spare))
    if not swept.is_empty:
        name, why = config.policy.name, "old enough (privacy.keep_days, keep_versions)"
        record = partial(
            audit.record, action=AuditAction.RETENTION, actor=actor, subject=name, reason=why, details=asdict(swept)
        )
        store.write(record)
    return swept


def _cutoff(config: Config, now: datetime) -> datetime | None:
    days = config.privacy.keep_days
    return None if days is None else now - timedelta(days=days)


def _old(before: datetime) -> sa.Select[Any]:
    """Groups of every policy, for the store is one; those whose texts are gone already have no hash of one."""
    aged = (group_table.c.created_at < before, group_table.c.prompt_hash != ERASED_HASH)
    return sa.select(group_table.c.group_id).where(*aged)


def _erase_some(c: Connection, before: datetime, now: datetime) -> int:
    ids = list(c.execute(_old(before).order_by(group_table.c.created_at).limit(BATCH)).scalars())
    stored.erase(c, ids, now)
    return len(ids)


def _old_datasets(c: Connection, before: datetime) -> list[Dataset]:
    """Those with a text that is too old, or that are so old themselves; not what an open cycle works with."""
    in_use = _in_use(c)
    oldest = (
        sa.select(sa.func.min(group_table.c.created_at))
        .select_from(
            dataset_pairs.join(pair_groups, pair_groups.c.pair_id == dataset_pairs.c.pair_id).join(
                group_table, group_table.c.group_id == pair_groups.c.group_id
            )
        )
        .where(dataset_pairs.c.dataset_id == dataset_table.c.dataset_id)
        .scalar_subquery()
    )
    gone = sa.exists().where(removed_artifacts.c.path == dataset_table.c.path)
    is_old = sa.or_(dataset_table.c.created_at < before, oldest < before)
    ids = c.execute(sa.select(dataset_table.c.dataset_id).where(~gone, is_old)).scalars().all()
    found = (datasets.get(c, dataset_id) for dataset_id in ids if dataset_id not in in_use)
    return [dataset for dataset in found if dataset is not None]


def _in_use(c: Connection) -> set[str]:
    open_cycles = (cycles.current(c, policy) for policy in versions.policies(c))
    steps = (step.record for cycle in open_cycles if cycle is not None for step in cycle.steps)
    return {str(record["dataset_id"]) for record in steps if "dataset_id" in record}


def _spare_versions(c: Connection, config: Config) -> list[Version]:
    """Adapters and models that never became champion, beyond the newest ``keep_versions``; not those that anything rests on."""
    keep = config.privacy.keep_versions
    if keep is None:
        return []
    found = versions.list_(c, config.policy.name, checkpoints=True)
    needed = _needed(c, config.policy.name, found)
    idle = [v for v in found if v.number not in needed and v.job_id is None and not removed.is_removed(c, v.path)]
    newest = {version.number for version in idle[max(len(idle) - keep, 0) :]}
    needed |= _with_ancestors(newest, found)  # a version is probed against its parent
    kept = {version.path for version in found if version.number in needed}  # the same weights may be two versions
    return [version for version in idle if version.number not in needed and version.path not in kept]


def _needed(c: Connection, policy: str, found: Collection[Version]) -> set[int]:
    """The base, what the aliases name, whatever was champion once (a rollback may want it), an open cycle's own, fine-tuned
    models, what somebody trains on or is to train on, and the ancestors of all of these."""
    needed: set[int | None] = {BASE_VERSION, *(versions.alias(c, policy, alias) for alias in Alias)}
    needed |= {
        number for move in versions.promotions(c, policy) if move.action != "retire" for number in (move.number, move.previous)
    }
    needed |= {version.number for version in found if version.job_id is not None}
    needed |= jobs.parents(c, policy) | runs.parents(c, policy)
    cycle = cycles.current(c, policy)
    if cycle is not None:
        needed |= {cycle.parent, *(step.record.get("version") for step in cycle.steps)}
    return _with_ancestors({number for number in needed if number is not None}, found)


def _with_ancestors(numbers: Collection[int], found: Collection[Version]) -> set[int]:
    parents = {version.number: version.parent for version in found}
    reached: set[int] = set()
    for number in numbers:
        at: int | None = number
        while at is not None and at not in reached:
            reached.add(at)
            at = parents.get(at)
    return reached
