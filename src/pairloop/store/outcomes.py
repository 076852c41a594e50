"""What became of groups: the pairs made of them, the datasets that hold those, the versions trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection

from pairloop.store import marks
from pairloop.store.groups import chunked
from pairloop.store.marks import Mark
from pairloop.store.schema import (
    completions,
    dataset_pairs,
    datasets,
    feedback,
    groups,
    pair_feedback,
    pair_groups,
    versions,
)
from pairloop.types import PREFERENCE_METRIC, FinishReason, GroupKind, Pool

NEWEST = 20_000
"""So many comparisons a funnel counts, the newest of its time."""


class InDataset(NamedTuple):
    """A dataset with a pair of the group, and the versions that were trained on it."""

    dataset_id: str
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Datasets oldest first; ``used``: ids of the feedback rows that a pair rests on."""

    datasets: tuple[InDataset, ...] = ()
    used: frozenset[str] = field(default=frozenset())
    is_excluded: bool = False
    is_queued: bool = False

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(sorted({number for one in self.datasets for number in one.versions}))


def outcomes(c: Connection, policy: str, group_ids: Sequence[str]) -> Mapping[str, Outcome]:
    """Of each of the groups."""
    held: dict[str, dict[str, list[int]]] = {group_id: {} for group_id in group_ids}
    used: dict[str, set[str]] = {group_id: set() for group_id in group_ids}
    for ids in chunked(group_ids):
        for row in c.execute(_datasets(policy, ids)):
            numbers = held[row.group_id].setdefault(row.dataset_id, [])
            numbers += [row.number] if row.number is not None else []
        said = sa.select(feedback.c.group_id, feedback.c.feedback_id).where(
            feedback.c.group_id.in_(ids), sa.exists().where(pair_feedback.c.feedback_id == feedback.c.feedback_id)
        )
        for group_id, feedback_id in c.execute(said):
            used[group_id].add(feedback_id)
    excluded, queued = (marks.set_on(c, mark, group_ids) for mark in (Mark.EXCLUDED, Mark.QUEUED))
    return {
        group_id: Outcome(
            tuple(InDataset(name, tuple(sorted(set(numbers)))) for name, numbers in held[group_id].items()),
            frozenset(used[group_id]),
            group_id in excluded,
            group_id in queued,
        )
        for group_id in group_ids
    }


def _datasets(policy: str, ids: Sequence[str]) -> sa.Select[tuple[str, str, int | None]]:
    made = sa.and_(versions.c.dataset_id == datasets.c.dataset_id, versions.c.policy == policy)
    holding = pair_groups.join(dataset_pairs, dataset_pairs.c.pair_id == pair_groups.c.pair_id)
    holding = holding.join(datasets, datasets.c.dataset_id == dataset_pairs.c.dataset_id).outerjoin(versions, made)
    columns = (pair_groups.c.group_id, datasets.c.dataset_id, versions.c.number, datasets.c.created_at)
    statement = sa.select(*columns).select_from(holding)
    return statement.where(pair_groups.c.group_id.in_(ids)).distinct().order_by(datasets.c.created_at, datasets.c.dataset_id)


def has_trained(policy: str, group_id: ColumnElement[str]) -> ColumnElement[bool]:
    """A condition: a version was trained on a dataset with a pair of the group.

    One EXISTS in another, not a join: it is read from the group outwards, where SQLite, which keeps no statistics, would begin
    with the versions and read all pairs of their datasets for each group.
    """
    made = sa.exists().where(versions.c.dataset_id == dataset_pairs.c.dataset_id, versions.c.policy == policy)
    held = sa.exists().where(dataset_pairs.c.pair_id == pair_groups.c.pair_id, made.correlate(dataset_pairs))
    return sa.exists().where(pair_groups.c.group_id == group_id, held.correlate(pair_groups))


class Funnel(NamedTuple):
    """Comparisons of a time, of the policy's own serving (nothing imported, no shadow).

    ``served``: two answers or more were begun; ``seen``: all of them went out to their end; ``voted``: somebody picked, tied or
    skipped; ``kept``: a pair of them is in a dataset; ``trained``: a version was trained on that, not only measured by it. Each
    is part of the one before but for ``kept``, which may rest on other feedback than votes. ``is_cut``: there were more, only
    the newest count.
    """

    served: int
    seen: int
    voted: int
    kept: int
    trained: int
    is_cut: bool


def funnel(c: Connection, policy: str, since: datetime, until: datetime) -> Funnel:
    """Of the newest `NEWEST` groups in that time."""
    newest = (
        sa.select(groups.c.group_id, groups.c.kind, groups.c.pool)
        .where(groups.c.policy == policy, groups.c.created_at >= since, groups.c.created_at < until)
        .order_by(groups.c.created_at.desc())
        .limit(NEWEST)
        .subquery()
    )
    group_id, answer = newest.c.group_id, completions.alias("other")
    n_all = c.execute(sa.select(sa.func.count()).select_from(newest)).scalar_one()
    own = newest.c.kind.not_in([GroupKind.IMPORTED.value, GroupKind.SHADOW.value])
    second = sa.exists().where(completions.c.group_id == group_id, completions.c.position == 1)
    gone = sa.exists().where(answer.c.group_id == group_id, answer.c.finish_reason == FinishReason.ABANDONED.value)
    voted = sa.exists().where(feedback.c.group_id == group_id, feedback.c.metric == PREFERENCE_METRIC)
    in_pair = sa.exists().where(pair_groups.c.group_id == group_id)
    trained = sa.and_(newest.c.pool == Pool.TRAIN.value, has_trained(policy, group_id))
    counts = [sa.func.coalesce(sa.func.sum(sa.case((is_so, 1), else_=0)), 0) for is_so in (~gone, voted, in_pair, trained)]
    row = c.execute(sa.select(sa.func.count(), *counts).select_from(newest).where(own, second)).one()
    served, seen, picked, kept, learned = map(int, row)
    return Funnel(served, seen, picked, kept, learned, is_cut=n_all == NEWEST)
