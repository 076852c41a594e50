"""Datasets and their lineage: which pairs a snapshot holds, and from which groups and feedback each pair came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection, Row

from pairloop.errors import NotFoundError
from pairloop.store import artifacts
from pairloop.store.bulk import BulkInsert
from pairloop.store.groups import ID_CHUNK
from pairloop.store.schema import (
    dataset_pairs,
    datasets,
    jobs,
    pair_feedback,
    pair_groups,
    removed_artifacts,
    runs,
    versions,
)
from pairloop.types import Dataset

PairLineage = tuple[str, Sequence[str], Sequence[str]]
"""(pair_id, group_ids, feedback_ids)"""


def insert(c: Connection, dataset: Dataset, *, feedback_seq: int, cycle_id: str | None, pairs: Iterable[PairLineage]) -> None:
    """Write a dataset with its pairs. A pair that an earlier dataset holds too has one lineage, to which rows may be added."""
    c.execute(
        sa.insert(datasets),
        {
            "dataset_id": dataset.dataset_id,
            "policy": dataset.policy,
            "cycle_id": cycle_id,
            "path": artifacts.to_row(c, dataset.path),
            "n_train": dataset.n_train,
            "n_heldout": dataset.n_heldout,
            "counts": dict(dataset.counts),
            "dropped": dict(dataset.dropped),
            "feedback_seq": feedback_seq,
            "created_at": dataset.created_at,
        },
    )
    add_lineage(c, dataset.dataset_id, pairs)


def add_lineage(c: Connection, dataset_id: str, pairs: Iterable[PairLineage]) -> None:
    """Write which pairs a dataset holds, and where each comes from; what is there already stays as it is.

    ``pairs`` may be a stream: some hundred are held at a time.
    """
    stream = iter(pairs)
    while some := list(islice(stream, ID_CHUNK)):
        _ADD_PAIRS(c, [(dataset_id, pair_id) for pair_id, _, _ in some])
        _ADD_GROUPS(c, [(pair_id, group_id) for pair_id, ids, _ in some for group_id in ids])
        _ADD_FEEDBACK(c, [(pair_id, feedback_id) for pair_id, _, ids in some for feedback_id in ids])


def get(c: Connection, dataset_id: str) -> Dataset | None:
    row = c.execute(sa.select(datasets).where(datasets.c.dataset_id == dataset_id)).first()
    return None if row is None else _dataset(c, row)


def current(c: Connection, dataset_id: str) -> Dataset | None:
    """The dataset with this id or, where rows were taken out of it since, what is left of it; None where it was removed."""
    at: str | None = dataset_id
    while at is not None:
        row = c.execute(sa.select(datasets).where(datasets.c.dataset_id == at)).first()
        if row is None:
            return None
        gone = c.execute(sa.select(removed_artifacts).where(removed_artifacts.c.path == row.path)).first()
        if gone is None:
            return _dataset(c, row)
        at = gone.successor
    return None


def feedback_seq(c: Connection, dataset_id: str) -> int:
    """Up to which feedback it looked; 0 for an unknown one."""
    return c.execute(sa.select(datasets.c.feedback_seq).where(datasets.c.dataset_id == dataset_id)).scalar() or 0


def list_(
    c: Connection, policy: str, *, after: str | None = None, limit: int | None = None, with_jobs: bool = False
) -> list[Dataset]:
    """Newest first; those that follow the dataset ``after``, at most ``limit``. NotFoundError for an unknown one.

    Without those whose folder was removed and, but for ``with_jobs``, those that were made of a fine-tuning job's files.
    """
    order = (*_NEWEST_FIRST, datasets.c.dataset_id)
    of_a_job = sa.exists().where(jobs.c.dataset_id == datasets.c.dataset_id)
    gone = sa.exists().where(removed_artifacts.c.path == datasets.c.path)
    statement = sa.select(datasets).where(datasets.c.policy == policy, ~gone).order_by(*order).limit(limit)
    if not with_jobs:
        statement = statement.where(~of_a_job)
    if after is not None:
        statement = statement.where(_behind(c, policy, after))
    return [_dataset(c, row) for row in c.execute(statement)]


def _behind(c: Connection, policy: str, dataset_id: str) -> ColumnElement[bool]:
    """What follows a dataset in the order of ``list_``."""
    last = c.execute(sa.select(datasets).where(datasets.c.policy == policy, datasets.c.dataset_id == dataset_id)).first()
    if last is None:
        raise NotFoundError(f"no dataset {dataset_id!r}", param="after")
    at, seq = datasets.c.created_at, datasets.c.feedback_seq
    later_id = sa.and_(seq == last.feedback_seq, datasets.c.dataset_id > last.dataset_id)
    return sa.or_(at < last.created_at, sa.and_(at == last.created_at, sa.or_(seq < last.feedback_seq, later_id)))


def used_seq(c: Connection, policy: str, version: int) -> int:
    """The feedback sequence number up to which ``version`` and its ancestors were trained; 0 where none was.

    By lineage, not by how cycles ended: a version that was promoted by hand has used its picks up, and what a version that was
    rolled back had learned from is new to the champion before it. Linear in the policy's versions.
    """
    statement = (
        sa.select(versions.c.number, versions.c.parent, datasets.c.feedback_seq)
        .select_from(versions.outerjoin(datasets, datasets.c.dataset_id == versions.c.dataset_id))
        .where(versions.c.policy == policy)
    )
    found = {row.number: row for row in c.execute(statement)}
    used, at = 0, found.get(version)
    while at is not None:
        used, at = max(used, at.feedback_seq or 0), found.get(at.parent)
    return used


def learned_from(c: Connection, policy: str, version: int) -> frozenset[str]:
    """The datasets that ``version`` and its ancestors were trained on. Linear in the policy's versions."""
    statement = sa.select(versions.c.number, versions.c.parent, versions.c.dataset_id).where(versions.c.policy == policy)
    found = {row.number: row for row in c.execute(statement)}
    learned, at = set[str](), found.get(version)
    while at is not None:
        learned |= {at.dataset_id} - {None}
        at = found.get(at.parent)
    return frozenset(learned)


class Seen(NamedTuple):
    """Up to which feedback a snapshot looked, and when."""

    feedback_seq: int
    created_at: datetime


def last_of_a_cycle(c: Connection, policy: str) -> Seen | None:
    """The newest dataset that a cycle built or trained on, whatever came of it; those built by hand alone do not count.

    The same evidence is the same dataset, whoever recorded it first: one built by hand is a cycle's own once it trains on it.
    """
    trained_on = (
        sa.exists()
        .where(runs.c.policy == policy, runs.c.dataset_id == datasets.c.dataset_id, runs.c.cycle_id.is_not(None))
        .correlate(datasets)
    )
    statement = sa.select(datasets.c.feedback_seq, datasets.c.created_at).where(
        datasets.c.policy == policy, sa.or_(datasets.c.cycle_id.is_not(None), trained_on)
    )
    row = c.execute(statement.order_by(*_NEWEST_FIRST).limit(1)).first()
    return None if row is None else Seen(row.feedback_seq, row.created_at)


def lineage(c: Connection, pair_id: str) -> tuple[list[str], list[str]]:
    """(group_ids, feedback_ids) of a pair, sorted; empty lists for an unknown one."""
    group_ids = c.execute(sa.select(pair_groups.c.group_id).where(pair_groups.c.pair_id == pair_id).order_by("group_id"))
    feedback_ids = c.execute(
        sa.select(pair_feedback.c.feedback_id).where(pair_feedback.c.pair_id == pair_id).order_by("feedback_id")
    )
    return list(group_ids.scalars()), list(feedback_ids.scalars())


class Evidence(NamedTuple):
    """How much stands behind a snapshot: its pairs, the comparisons they came from, and what was said about those."""

    pairs: int
    groups: int
    feedback: int


def evidence(c: Connection, dataset_id: str) -> Evidence:
    """Zeros for rows that came from files, which have no picks behind them."""
    mine = dataset_pairs.c.dataset_id == dataset_id

    def counted(table: sa.Table, column: sa.Column[Any]) -> int:
        joined = dataset_pairs.join(table, table.c.pair_id == dataset_pairs.c.pair_id)
        return c.execute(sa.select(sa.func.count(column.distinct())).select_from(joined).where(mine)).scalar_one()

    pairs = c.execute(sa.select(sa.func.count()).select_from(dataset_pairs).where(mine)).scalar_one()
    return Evidence(pairs, counted(pair_groups, pair_groups.c.group_id), counted(pair_feedback, pair_feedback.c.feedback_id))


def containing_feedback(c: Connection, feedback_id: str) -> list[str]:
    """Ids of the datasets that hold a pair made from this feedback, oldest first."""
    holding = (
        sa.select(dataset_pairs.c.dataset_id)
        .join(pair_feedback, pair_feedback.c.pair_id == dataset_pairs.c.pair_id)
        .where(pair_feedback.c.feedback_id == feedback_id)
    )
    statement = sa.select(datasets.c.dataset_id).where(datasets.c.dataset_id.in_(holding))
    return list(c.execute(statement.order_by(datasets.c.created_at, datasets.c.feedback_seq)).scalars())


_NEWEST_FIRST = (datasets.c.created_at.desc(), datasets.c.feedback_seq.desc())

_ADD_PAIRS = BulkInsert(dataset_pairs, ("dataset_id", "pair_id"), known_stay=True)
_ADD_GROUPS = BulkInsert(pair_groups, ("pair_id", "group_id"), known_stay=True)
_ADD_FEEDBACK = BulkInsert(pair_feedback, ("pair_id", "feedback_id"), known_stay=True)


def _dataset(c: Connection, row: Row[Any]) -> Dataset:
    return Dataset(
        dataset_id=row.dataset_id,
        policy=row.policy,
        path=artifacts.from_row(c, row.path),
        n_train=row.n_train,
        n_heldout=row.n_heldout,
        counts=row.counts,
        dropped=row.dropped,
        created_at=row.created_at,
    )
