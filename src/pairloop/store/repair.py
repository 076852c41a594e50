"""Mends what the doctor found, as far as nothing is made up and no evidence goes: each repair is recorded with its reason.

What is gone comes back from a backup where one is given. A repair looks again inside its transaction: where a running server
has moved on meanwhile, it does nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.errors import ConflictError, RowsError, StoreError
from pairloop.formats.snapshot import HELDOUT_FILE, TRAIN_FILE, read_rows
from pairloop.store import canaries, contents, datasets, doctor, duels, files, jobs, removed, repairs, versions
from pairloop.store.archive import Archive, remove_staged
from pairloop.store.backup import publish_copy
from pairloop.store.contents import NamedArtifact
from pairloop.store.datasets import PairLineage
from pairloop.store.doctor import Problem
from pairloop.store.groups import chunked
from pairloop.store.repairs import RepairRecord
from pairloop.store.schema import feedback, groups
from pairloop.store.store import Store
from pairloop.types import Alias, VersionKind

logger = logging.getLogger(__name__)

_ROUNDS = 4
"""A repair may show what stood behind it: an artifact that is lost can be accepted once no alias names its version."""


def _no_files() -> None:
    return None


def _no_rows(_: Connection) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Repair:
    """What would be done about a problem, in words, and the doing: files first, then rows, in the record's transaction."""

    problem: Problem
    action: str
    in_files: Callable[[], None] = _no_files
    in_rows: Callable[[Connection], None] = _no_rows
    is_loss: bool = False


@dataclass(frozen=True, slots=True)
class Mended:
    """What was done, and what is left."""

    repairs: Sequence[RepairRecord]
    problems: Sequence[Problem]


def mend(store: Store, *, actor: str, archive: Archive | None = None, accept_loss: bool = False, deep: bool = False) -> Mended:
    """Repair what can be, and check again; a repair that fails is told of in the log, and its problem stays.

    ``actor``: who asked for it, as in the audit trail.
    """
    done: list[RepairRecord] = []
    for _ in range(_ROUNDS):
        planned = plan(store, archive=archive, accept_loss=accept_loss, deep=deep)[1]
        made = [record for repair in planned if (record := _perform(store, repair, actor)) is not None]
        done += made
        if not made:
            break
    return Mended(done, doctor.check(store, deep=deep))


def plan(
    store: Store, *, archive: Archive | None = None, accept_loss: bool = False, deep: bool = False
) -> tuple[Sequence[Problem], Sequence[Repair]]:
    """What is wrong now, and what ``mend`` would do about it first. Changes nothing."""
    problems = doctor.check(store, accepted=archive is not None, deep=deep)
    return problems, list(_Plan(store, archive, problems, accept_loss=accept_loss).repairs())


def _perform(store: Store, repair: Repair, actor: str) -> RepairRecord | None:
    problem = repair.problem
    record = RepairRecord(problem.code, problem.subject, problem.text, repair.action, repair.is_loss, datetime.now(UTC))

    def write(c: Connection) -> None:
        repair.in_rows(c)
        repairs.record(c, record, actor=actor)

    try:
        repair.in_files()
        store.write(write)
    except (ConflictError, StoreError, OSError) as error:  # the other repairs may well succeed
        logger.warning("doctor: %s: not repaired: %s", problem.text, error)
        return None
    logger.warning("doctor: %s: %s", problem.text, repair.action)
    return record


class _Plan:
    """The repairs that these problems call for, each subject once."""

    def __init__(self, store: Store, archive: Archive | None, problems: Sequence[Problem], *, accept_loss: bool) -> None:
        self._store, self._archive, self._problems, self._accept_loss = store, archive, problems, accept_loss
        with store.reading() as c:
            self._named = {one.subject: one for one in contents.artifacts(c)}
            self._lost = repairs.losses(c)
            self._in_use = set(doctor.aliased(c))
        self._broken = {one.subject for one in problems if one.code in ("missing_artifact", "broken_artifact")} | self._lost
        self._coming_back: set[str] = set()

    def repairs(self) -> Iterator[Repair]:
        seen: set[tuple[str, str]] = set()
        for problem in self._artifacts_first():
            repair = self._repair(problem)
            if repair is not None and (repair.action, problem.subject) not in seen:
                seen.add((repair.action, problem.subject))
                yield repair

    def _artifacts_first(self) -> Iterable[Problem]:
        return sorted(self._problems, key=lambda problem: problem.code not in ("missing_artifact", "broken_artifact"))

    def _repair(self, problem: Problem) -> Repair | None:
        match problem.code:
            case "missing_artifact" | "broken_artifact":
                return self._artifact(problem, self._named[problem.subject])
            case "dangling_alias" | "unusable_alias" | "no_champion":
                return self._alias(problem)
            case "pair_without_feedback" | "pair_without_group" | "dataset_without_pairs":
                return self._lineage(problem)
            case "open_duel":
                return Repair(
                    problem, f"{problem.subject} closed", in_rows=lambda c: duels.close(c, problem.subject, datetime.now(UTC))
                )
            case "missing_file" | "broken_file":
                return self._upload(problem)
            case "stale_folder":
                path = Path(problem.subject)
                return Repair(problem, "removed", in_files=lambda: shutil.rmtree(path, ignore_errors=True))
            case "unfinished_restore":
                copy = Path(problem.subject)
                return Repair(problem, "removed", in_files=lambda: remove_staged(copy))
            case "unfinished_upload" | "orphan_checkpoint":
                url = problem.subject
                return Repair(problem, "removed", in_files=lambda: self._store.artifacts.remove_leftover(url))
            case "unreferenced_artifact":
                return self._unreferenced(problem)
            case _:
                return None

    def _artifact(self, problem: Problem, named: NamedArtifact) -> Repair | None:
        artifacts, archive = self._store.artifacts, self._archive
        if archive is not None and named.path == artifacts.path(named.hash) and archive.has(named.hash):
            self._coming_back.add(problem.subject)
            source = archive.artifacts.path(named.hash)
            return Repair(
                problem, f"copied from the backup {archive.path.name}", in_files=lambda: publish_copy(source, artifacts)
            )
        if not self._accept_loss or problem.subject in self._in_use | self._lost:
            return None
        return Repair(problem, "recorded as lost", is_loss=True)

    def _alias(self, problem: Problem) -> Repair | None:
        policy, _, alias = problem.subject.rpartition("@")
        with self._store.reading() as c:
            now = versions.alias(c, policy, Alias(alias))
            target = self._last_whole(c, policy)
        if now is not None and f"{policy}@{now}" in self._coming_back:
            return None
        if alias == Alias.CHALLENGER:
            action = f"alias {alias} of {policy} cleared, its duel closed"
            return Repair(problem, action, in_rows=lambda c: _clear_challenger(c, policy, now, problem.text))
        if alias == Alias.CANARY:
            action = f"alias {alias} of {policy} cleared, its canary withdrawn"
            return Repair(problem, action, in_rows=lambda c: _clear_canary(c, policy, now, problem.text))
        if target is None:
            return None
        action = f"champion of {policy} is version {target}, the last promoted one that is whole"
        return Repair(problem, action, in_rows=lambda c: _move_champion(c, policy, now, target, problem.text))

    def _last_whole(self, c: Connection, policy: str) -> int | None:
        for number in reversed(versions.past_champions(versions.promotions(c, policy))):
            version = versions.get(c, policy, number)
            if version is None or removed.is_removed(c, version.path):
                continue
            if version.kind is VersionKind.BASE or version.name not in self._broken:
                return number
        return None

    def _lineage(self, problem: Problem) -> Repair | None:
        """From the dataset's own file, which names groups and feedback of each row; only what the store still has."""
        named = self._named.get(problem.subject)
        if named is None or problem.subject in self._broken:
            return None
        with self._store.reading() as c:
            lineage = _existing(c, _read_lineage(self._store.artifacts.local(named.path)))
            mends = _would_mend(c, problem, lineage)
        if not mends:
            return None
        action = f"lineage of {len(lineage)} pairs read from {named.path}"
        return Repair(problem, action, in_rows=lambda c: datasets.add_lineage(c, problem.subject, lineage))

    def _upload(self, problem: Problem) -> Repair | None:
        with self._store.reading() as c:
            file, job = files.get(c, problem.subject), jobs.using_file(c, problem.subject)
        archive = self._archive
        if archive is not None and file is not None and archive.has_upload(file.file_id, file.sha256):
            size, file_id = file.size, file.file_id

            def copy() -> None:
                with archive.upload(file_id).open("rb") as source:
                    self._store.artifacts.keep_file(file_id, source, limit=size)

            return Repair(problem, f"copied from the backup {archive.path.name}", in_files=copy)
        if job is not None:
            return None
        return Repair(problem, "marked as deleted", in_rows=lambda c: files.forget(c, [problem.subject], datetime.now(UTC)))

    def _unreferenced(self, problem: Problem) -> Repair:
        """Into the temporary folder, which is emptied of what is older than a day. No transaction waits for a URL.

        It is a day old, so hardly anybody is about to name it; a row that comes in between is what the next check finds.
        """
        path = Path(problem.subject)

        def move() -> None:
            with self._store.reading() as c:
                named = path.parent.name == "files" and files.get(c, path.name) is not None
                named = named or path.name in contents.manifests(c)
                named = named or any(self._store.artifacts.path(one.hash) == path for one in contents.artifacts(c))
            if named:
                raise ConflictError("a row names it by now")
            self._store.artifacts.set_aside(path, "unreferenced")

        return Repair(problem, "moved to tmp/ beside the artifacts, where it is removed a day later", in_files=move)


def _move_champion(c: Connection, policy: str, found: int | None, target: int, why: str) -> None:
    _refuse_moved(c, policy, Alias.CHAMPION, found)
    versions.set_alias(c, policy, Alias.CHAMPION, target)
    at = datetime.now(UTC)
    versions.record_promotion(
        c, policy, number=target, previous=found, action="rollback", reason=f"doctor: {why}", cycle_id=None, at=at
    )
    _end_duel(c, policy, at)
    _end_canary(c, policy, why, at)


def _clear_challenger(c: Connection, policy: str, found: int | None, why: str) -> None:
    _refuse_moved(c, policy, Alias.CHALLENGER, found)
    at = datetime.now(UTC)
    _end_duel(c, policy, at)
    if found is not None and versions.get(c, policy, found) is not None:
        champion = versions.alias(c, policy, Alias.CHAMPION)
        versions.record_promotion(
            c, policy, number=found, previous=champion, action="retire", reason=f"doctor: {why}", cycle_id=None, at=at
        )


def _clear_canary(c: Connection, policy: str, found: int | None, why: str) -> None:
    _refuse_moved(c, policy, Alias.CANARY, found)
    _end_canary(c, policy, why, datetime.now(UTC))


def _refuse_moved(c: Connection, policy: str, alias: Alias, found: int | None) -> None:
    now = versions.alias(c, policy, alias)
    if now != found:
        raise ConflictError(f"{alias} of {policy} became {now} meanwhile")


def _end_duel(c: Connection, policy: str, at: datetime) -> None:
    """No duel outlives a change of its two sides; its cycle is held when it is next looked at."""
    versions.set_alias(c, policy, Alias.CHALLENGER, None)
    duels.close_all(c, policy, at)


def _end_canary(c: Connection, policy: str, why: str, at: datetime) -> None:
    """No canary outlives a change of the champion whose place it takes for some."""
    versions.set_alias(c, policy, Alias.CANARY, None)
    canary = canaries.current(c, policy)
    if canary is not None:
        canaries.close(c, canary.canary_id, "withdrawn", f"doctor: {why}", at)


def _read_lineage(folder: Path) -> list[PairLineage]:
    try:
        return [
            (row.row_id, row.group_ids, row.feedback_ids)
            for name in (TRAIN_FILE, HELDOUT_FILE)
            if (folder / name).exists()
            for row in read_rows(folder / name)
        ]
    except RowsError as error:
        logger.warning("doctor: %s", error)
        return []


def _existing(c: Connection, lineage: Sequence[PairLineage]) -> list[PairLineage]:
    """The lineage as far as its groups and feedback are in the store."""
    group_ids = _known(c, groups.c.group_id, (one for _, ids, _ in lineage for one in ids))
    feedback_ids = _known(c, feedback.c.feedback_id, (one for _, _, ids in lineage for one in ids))
    return [
        (pair_id, [one for one in in_groups if one in group_ids], [one for one in in_feedback if one in feedback_ids])
        for pair_id, in_groups, in_feedback in lineage
    ]


def _known(c: Connection, column: sa.Column[str], ids: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for some in chunked(sorted(set(ids))):
        found |= set(c.execute(sa.select(column).where(column.in_(some))).scalars())
    return found


def _would_mend(c: Connection, problem: Problem, lineage: Sequence[PairLineage]) -> bool:
    """True where the file says something that the rows do not."""
    if problem.code == "dataset_without_pairs":
        return bool(lineage)
    side = 0 if problem.code == "pair_without_group" else 1
    return any(
        (in_groups, in_feedback)[side] and not datasets.lineage(c, pair_id)[side] for pair_id, in_groups, in_feedback in lineage
    )
