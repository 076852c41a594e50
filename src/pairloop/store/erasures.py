"""Erasures of people: what there is of someone, how it goes, who was erased (hashed), and which versions had seen them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Row, Table

from pairloop.store import operators, replies, saved_views, set_aside, stored
from pairloop.store.groups import chunked
from pairloop.store.schema import (
    audit,
    dataset_pairs,
    erasures,
    feedback,
    groups,
    pair_feedback,
    pair_groups,
    quarantines,
    reservations,
    version_marks,
    versions,
)
from pairloop.store.subjects import CONVERSATION, RATER, as_people, is_operator, of_operator, of_person


@dataclass(frozen=True, slots=True)
class Erasure:
    """One erasure; ``subject_hash`` is SHA-256 over salt and id, or the pseudonym that stands for it. ``counts``: what went, by
    its noun."""

    erasure_id: str
    salt: str
    subject_hash: str
    reason: str
    counts: Mapping[str, int]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Found:
    """What there is of someone. ``feedback_ids`` are what they said about any group; ``pair_ids`` rest on either."""

    group_ids: tuple[str, ...]
    feedback_ids: tuple[str, ...]
    pair_ids: frozenset[str]
    dataset_ids: tuple[str, ...]
    quarantines: int
    traces: int
    """What they were shown in the labelling queue, saved views that name them, and an operator's name in the audit trail."""

    @property
    def is_empty(self) -> bool:
        return not (self.group_ids or self.feedback_ids or self.pair_ids or self.quarantines or self.traces)


@dataclass(frozen=True, slots=True)
class Mark:
    """A version that was trained on ``rows`` rows of someone who was erased later."""

    policy: str
    number: int
    erasure_id: str
    rows: int
    created_at: datetime


def hashed(salt: str, subject: str) -> str:
    return hashlib.sha256(f"{salt}{subject}".encode("utf-8", "surrogatepass")).hexdigest()


def find(c: Connection, subjects: Collection[str]) -> Found:
    """What there is of those ids, as users and as raters. Reads an index of raters, and all users."""
    people = as_people(subjects)
    group_ids = list(c.execute(sa.select(groups.c.group_id).where(groups.c.user.in_(people))).scalars())
    nameless = [one.removeprefix(CONVERSATION) for one in people if one.startswith(CONVERSATION)]
    if nameless:
        is_theirs = sa.or_(groups.c.conversation_id.in_(nameless), groups.c.group_id.in_(nameless))
        group_ids += c.execute(sa.select(groups.c.group_id).where(groups.c.user.is_(None), is_theirs)).scalars()
    feedback_ids = list(c.execute(sa.select(feedback.c.feedback_id).where(feedback.c.rater_id.in_(people))).scalars())
    pair_ids = frozenset(pairs_of(c, group_ids, feedback_ids))
    held = sa.select(sa.func.count()).select_from(quarantines).where(quarantines.c.rater_id.in_(people))
    shown = sa.select(sa.func.count()).select_from(reservations).where(reservations.c.rater_id.in_(people))
    return Found(
        tuple(group_ids),
        tuple(feedback_ids),
        pair_ids,
        tuple(_datasets_of(c, pair_ids)),
        c.execute(held).scalar_one(),
        c.execute(shown).scalar_one() + saved_views.naming(c, people) + operators.count(c, subjects),
    )


def pairs_of(c: Connection, group_ids: Sequence[str], feedback_ids: Sequence[str]) -> Iterator[str]:
    """The pairs that rest on any of these groups or feedback rows."""
    for ids in chunked(group_ids):
        yield from c.execute(sa.select(pair_groups.c.pair_id).where(pair_groups.c.group_id.in_(ids))).scalars()
    for ids in chunked(feedback_ids):
        yield from c.execute(sa.select(pair_feedback.c.pair_id).where(pair_feedback.c.feedback_id.in_(ids))).scalars()


def rows_by_version(c: Connection, pair_ids: Collection[str]) -> dict[tuple[str, int], int]:
    """(policy, number) of each version that was trained on a dataset with any of these pairs → how many of them."""
    per_dataset: dict[str, int] = {}
    for ids in chunked(sorted(pair_ids)):
        statement = sa.select(dataset_pairs.c.dataset_id, sa.func.count()).where(dataset_pairs.c.pair_id.in_(ids))
        for dataset_id, rows in c.execute(statement.group_by(dataset_pairs.c.dataset_id)):
            per_dataset[dataset_id] = per_dataset.get(dataset_id, 0) + rows
    made = sa.select(versions.c.policy, versions.c.number, versions.c.dataset_id).where(versions.c.dataset_id.in_(per_dataset))
    return {(row.policy, row.number): per_dataset[row.dataset_id] for row in c.execute(made)}


def forget_pairs(c: Connection, pair_ids: Collection[str]) -> None:
    """Take pairs out of all datasets' lineage; their rows go with the datasets' folders."""
    for ids in chunked(sorted(pair_ids)):
        for table in (dataset_pairs, pair_groups, pair_feedback):
            c.execute(sa.delete(table).where(table.c.pair_id.in_(ids)))


def erase_groups(c: Connection, group_ids: Sequence[str], at: datetime) -> None:
    """The texts of someone's groups, and whose they were; see `groups.erase`."""
    stored.erase(c, group_ids, at, with_user=True)


def erase_feedback(c: Connection, feedback_ids: Sequence[str]) -> None:
    """Rows gone, with the replies that were kept about them. Their pairs must be forgotten before."""
    for ids in chunked(feedback_ids):
        set_aside.forget(c, ids)
        c.execute(sa.delete(feedback).where(feedback.c.feedback_id.in_(ids)))
        replies.forget(c, ids)


def forget_decisions(c: Connection, subjects: Collection[str], at: datetime) -> None:
    """Decisions about someone go, with what they were shown and saved views that name them; the audit trail tells no name."""
    theirs = as_people(subjects)
    saved_views.forget(c, theirs)
    operators.forget(c, subjects, at)
    c.execute(sa.delete(quarantines).where(quarantines.c.rater_id.in_(theirs)))
    c.execute(sa.delete(reservations).where(reservations.c.rater_id.in_(theirs)))
    named = [f"{RATER}{one}" for one in theirs]
    c.execute(sa.update(audit).where(audit.c.subject.in_(named)).values(subject=operators.NOBODY))


def people(c: Connection) -> Iterator[str]:
    """Every subject that is known: users, raters, operators, and those who asked without saying who they are."""
    for column in (groups.c.user, feedback.c.rater_id, quarantines.c.rater_id, reservations.c.rater_id):
        yield from map(of_person, c.execute(sa.select(column).where(column.is_not(None)).distinct()).scalars())
    yield from map(of_operator, filter(is_operator, operators.named(c)))
    yield from map(of_person, saved_views.named(c))
    nameless = sa.select(sa.func.coalesce(groups.c.conversation_id, groups.c.group_id)).where(groups.c.user.is_(None))
    yield from (f"{CONVERSATION}{name}" for name in c.execute(nameless.distinct()).scalars())


def insert(c: Connection, erasure: Erasure) -> None:
    """Record an erasure; one that is recorded already keeps its first record."""
    if get(c, erasure.erasure_id) is None:
        c.execute(sa.insert(erasures), {**_columns(erasures, erasure), "counts": dict(erasure.counts)})


def mark(c: Connection, policy: str, number: int, erasure_id: str, rows: int) -> None:
    """Note on a version that it had seen someone; rows found later add up."""
    this = [version_marks.c.policy == policy, version_marks.c.number == number, version_marks.c.erasure_id == erasure_id]
    if c.execute(sa.update(version_marks).where(*this).values(rows=version_marks.c.rows + rows)).rowcount == 0:
        row = {"policy": policy, "number": number, "erasure_id": erasure_id, "rows": rows}
        c.execute(sa.insert(version_marks), row)


def get(c: Connection, erasure_id: str) -> Erasure | None:
    row = c.execute(sa.select(erasures).where(erasures.c.erasure_id == erasure_id)).first()
    return None if row is None else _erasure(row)


def list_(c: Connection, *, after: str | None = None, limit: int | None = None) -> list[Erasure]:
    """Newest first; those that follow ``after``, whose ids rise with time."""
    statement = sa.select(erasures).order_by(erasures.c.erasure_id.desc()).limit(limit)
    if after is not None:
        statement = statement.where(erasures.c.erasure_id < after)
    return [_erasure(row) for row in c.execute(statement)]


def marks(c: Connection, policy: str) -> list[Mark]:
    """The versions of a policy that had seen somebody who was erased since, by number."""
    statement = (
        sa.select(version_marks, erasures.c.created_at)
        .join(erasures)
        .where(version_marks.c.policy == policy)
        .order_by(version_marks.c.number, version_marks.c.erasure_id)
    )
    return [Mark(row.policy, row.number, row.erasure_id, row.rows, row.created_at) for row in c.execute(statement)]


@dataclass(frozen=True, slots=True)
class Burden:
    """What a version has of people who were erased since: its own ``rows``, and the ``ancestors`` that had some."""

    rows: int
    ancestors: tuple[int, ...]


def burdens(c: Connection, policy: str) -> dict[int, Burden]:
    """By number, the versions of a policy that had seen erased people, or descend from one that had."""
    own: dict[int, int] = {}
    for one in marks(c, policy):
        own[one.number] = own.get(one.number, 0) + one.rows
    if not own:
        return {}
    parents = {row.number: row.parent for row in c.execute(sa.select(versions).where(versions.c.policy == policy))}
    found = {}
    for number in parents:
        at, above = parents[number], []
        while at is not None:
            above += [at] * (at in own)
            at = parents.get(at)
        if number in own or above:
            found[number] = Burden(own.get(number, 0), tuple(above))
    return found


def _datasets_of(c: Connection, pair_ids: Collection[str]) -> list[str]:
    found: dict[str, None] = {}
    for ids in chunked(sorted(pair_ids)):
        statement = sa.select(dataset_pairs.c.dataset_id).where(dataset_pairs.c.pair_id.in_(ids)).distinct()
        found |= dict.fromkeys(c.execute(statement.order_by(dataset_pairs.c.dataset_id)).scalars())
    return list(found)


def _columns(table: Table, erasure: Erasure) -> dict[str, Any]:
    columns: list[Column[Any]] = list(table.columns)
    return {column.name: getattr(erasure, column.name) for column in columns}


def _erasure(row: Row[Any]) -> Erasure:
    return Erasure(row.erasure_id, row.salt, row.subject_hash, row.reason, row.counts, row.created_at)
