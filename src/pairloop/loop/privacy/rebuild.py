"""Rebuild: train a version again from its manifest, without some people; it becomes a new version, which nobody promotes.

Same parent, same recipe, same seed, and its dataset as it is now: what was erased is not in it, nor is what rests on the people
who are left out. With nothing left out, the weights come out as they were, to the last bit on the same machine.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection

from pairloop.config import Config, parse_config
from pairloop.errors import ConflictError, TrainingError, UserError
from pairloop.loop import train
from pairloop.loop.privacy import cleaning, ledger
from pairloop.loop.privacy.people import ids_of
from pairloop.loop.train import OnProgress
from pairloop.store import Store, audit, datasets, erasures, removed, runs, versions
from pairloop.store.audit import SCHEDULER, AuditAction
from pairloop.store.erasures import hashed
from pairloop.types import Dataset, RunStatus, Version, VersionKind


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A version made again. ``rows_left_out``: of its dataset, now. ``same_weights``: as the original's.

    ``ancestors``: versions it descends from that were trained on rows of those left out, and were not rebuilt.
    """

    version: Version
    rebuilt_from: int
    dataset_id: str
    rows_left_out: int
    same_weights: bool
    ancestors: tuple[int, ...] = field(default=())


def rebuild(
    store: Store,
    config: Config,
    number: int,
    *,
    without: Sequence[str] = (),
    chain: bool = False,
    owner: str,
    actor: str = SCHEDULER,
    on_progress: OnProgress | None = None,
) -> list[Rebuilt]:
    """Train version ``number`` again, without the picks and the groups of ``without``; with ``chain`` its ancestors first,
    from the earliest that was trained on rows of theirs (or of somebody erased since). What was made, the last for ``number``.

    UserError where a version cannot be made again, ConflictError while another run of the policy trains, TrainingError where
    a training failed.
    """
    policy = config.policy.name
    people = [name for person in without for name in ids_of(store, config, person)]
    with store.reading() as c:
        lineage = _lineage(c, policy, number)
        _refuse_strangers(store, config, c, lineage, without)
        affected = _affected(c, policy, people)
        _refuse_beside(c, policy)
    above = [version.number for version in lineage[:-1] if version.number in affected]
    first = lineage.index(next(v for v in lineage if v.number == above[0])) if chain and above else len(lineage) - 1
    todo = lineage[first:]
    made: list[Rebuilt] = []
    for version in todo:
        parent = made[-1].version if made else _parent_of(store, version)
        left = () if chain else tuple(above)
        made.append(_again(store, config, version, parent, people, left, owner=owner, on_progress=on_progress))
    for one in made:
        store.write(partial(_record, actor=actor, one=one))
    return made


def _record(c: Connection, *, actor: str, one: Rebuilt) -> None:
    reason, details = f"version {one.rebuilt_from} made again", {"rows_left_out": one.rows_left_out}
    audit.record(c, AuditAction.REBUILD, actor=actor, subject=one.version.name, reason=reason, details=details)


def _again(
    store: Store,
    config: Config,
    version: Version,
    parent: Version,
    people: Sequence[str],
    ancestors: tuple[int, ...],
    *,
    owner: str,
    on_progress: OnProgress | None,
) -> Rebuilt:
    recipe = _recipe(store, version)
    dataset, left_out = _dataset(store, version, people)
    if not dataset.n_train:
        raise UserError(f"{version.name}: nothing is left to train on without them; its parent {parent.name} is that version")
    salt = secrets.token_hex(16)
    record = {
        "rebuilt_from": version.number,
        "without": {"salt": salt, "hashes": [hashed(salt, person) for person in people]},
        "rows_left_out": left_out,
    }
    done = train.run(
        store,
        _as_then(config, recipe),
        dataset=dataset,
        parent=parent,
        owner=owner,
        on_progress=on_progress,
        also_recorded=record,
    )
    if done.version is None:
        why = (done.result.get("error") or {}).get("message") or done.result.get("stop_message") or done.status
        raise TrainingError(f"{version.name} could not be rebuilt: {why}")
    same = done.version.artifact_hash == version.artifact_hash
    return Rebuilt(done.version, version.number, dataset.dataset_id, left_out, same, ancestors)


def _lineage(c: Connection, policy: str, number: int) -> list[Version]:
    """The version and its ancestors that were trained here, the earliest first."""
    found: list[Version] = []
    at: Version | None = versions.named(c, policy, str(number))
    while at is not None and at.kind is not VersionKind.BASE:
        found.insert(0, at)
        at = None if at.parent is None else versions.get(c, policy, at.parent)
    if not found:
        raise UserError(f"{policy}@{number} is the base model: nothing was trained")
    return found


def _affected(c: Connection, policy: str, people: Collection[str]) -> set[int]:
    """Versions that were trained on rows of these people, or of somebody who was erased since."""
    found = erasures.find(c, people)
    seen = {number for name, number in erasures.rows_by_version(c, found.pair_ids) if name == policy}
    return seen | {mark.number for mark in erasures.marks(c, policy)}


def _refuse_strangers(store: Store, config: Config, c: Connection, lineage: Sequence[Version], without: Sequence[str]) -> None:
    """UserError for a name of whom nothing is in what any of these was trained on: a typo would train the same again."""
    ours = {(version.policy, version.number) for version in lineage}
    for person in without:
        names = ids_of(store, config, person)
        if ours.isdisjoint(erasures.rows_by_version(c, erasures.find(c, names).pair_ids)):
            if _was_erased(config, c, names):
                raise UserError(f"{person!r} was erased: what was erased is left out anyway, leave `--without {person}` away")
            what = f"{lineage[-1].name} and its ancestors were trained on"
            raise UserError(f"nothing of {person!r} is in what {what}; `pairloop raters list` names who gave feedback")


def _was_erased(config: Config, c: Connection, names: Collection[str]) -> bool:
    """By the ledger, which has the hash of every id, and by the database, which has that of one."""
    entries = [*ledger.read(ledger.path_of(config)), *map(ledger.entry_of, erasures.list_(c))]
    return any(entry.is_about(name) for entry in entries for name in names)


def _refuse_beside(c: Connection, policy: str) -> None:
    """One training at a time: two would share the machine's memory, and their numbers."""
    busy = next((run for run in runs.list_(c, policy) if run.status is RunStatus.RUNNING), None)
    if busy is not None and busy.lease_expires_at > datetime.now(UTC):
        raise ConflictError(f"run {busy.run_id} of {policy} is training; rebuild when it has ended")


def _parent_of(store: Store, version: Version) -> Version:
    with store.reading() as c:
        parent = None if version.parent is None else versions.get(c, version.policy, version.parent)
        is_gone = parent is not None and removed.is_removed(c, parent.path)
    if parent is None:
        raise UserError(f"{version.name} has no parent in the store: it cannot be made again")
    if is_gone:
        raise UserError(
            f"{version.name} was trained on {parent.name}, whose weights were removed by their age: "
            f"`pairloop rebuild {parent.number}` first"
        )
    return parent


def _dataset(store: Store, version: Version, people: Sequence[str]) -> tuple[Dataset, int]:
    """What the version was trained on, as far as it is left, without what rests on ``people``."""
    with store.reading() as c:
        dataset = None if version.dataset_id is None else datasets.current(c, version.dataset_id)
        found = erasures.find(c, people)
    if dataset is None:
        why = "its dataset was removed (privacy.keep_days)" if version.dataset_id is not None else "it has no dataset"
        raise UserError(f"{version.name} cannot be made again: {why}")
    if not people:
        return dataset, 0
    ids = frozenset(found.feedback_ids)
    return cleaning.without(store, dataset, lambda row: row.row_id in found.pair_ids, feedback_ids=ids)


def _recipe(store: Store, version: Version) -> Mapping[str, Any]:
    """How it was trained, from its own record, else from its folder's manifest."""
    record = version.record
    if record is None or "recipe" not in record:
        record = store.artifacts.manifest_of(version.path)
    recipe: Mapping[str, Any] | None = record.get("recipe")
    if recipe is None:
        raise UserError(f"{version.name} has no manifest that says how it was trained: it cannot be made again")
    return recipe


_OF_POLICY = ("method", "lora_rank", "lora_alpha", "lora_targets", "dtype", "quantization", "device")


def _as_then(config: Config, recipe: Mapping[str, Any]) -> Config:
    """The configuration with the recipe's settings; where it is done (launcher, processes) is as it is now."""
    data = config.model_dump()
    for key in _OF_POLICY:
        data["policy"][key] = recipe[key]
    data["serve"]["max_context"] = recipe["max_context"]
    data["train"] = {**data["train"], **recipe["train"]}
    return parse_config(data, origin="the version's manifest")
