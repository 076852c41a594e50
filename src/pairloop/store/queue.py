"""What may be shown to a rater: comparisons that nobody picked from yet, and those that this rater picked from."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import completions, feedback, groups
from pairloop.types import PREFERENCE_METRIC, REPEAT_METRIC, GroupKind, Label, Pool, Source

NEWEST = 2_000
"""So many of a pool's newest groups are looked at, so that a store in which all is labelled is not read through."""

_KINDS = (GroupKind.TRAIN.value, GroupKind.HELDOUT.value)
"""Not duels: who has picked from one was told its versions."""


class Picked(NamedTuple):
    """A decisive pick: the group, and the order in which its answers were shown."""

    group_id: str
    shown_order: tuple[int, ...]


def unpicked(c: Connection, policy: str, pool: Pool, limit: int) -> list[str]:
    """Ids of the pool's comparisons from which no person has picked, newest first."""
    newest = (
        sa.select(groups.c.group_id, groups.c.kind)
        .where(groups.c.policy == policy, groups.c.pool == pool.value)
        .order_by(groups.c.created_at.desc())
        .limit(NEWEST)
        .subquery()
    )
    is_comparison = sa.exists().where(completions.c.group_id == newest.c.group_id, completions.c.position == 1)
    is_picked = sa.exists().where(
        feedback.c.group_id == newest.c.group_id,
        feedback.c.metric == PREFERENCE_METRIC,
        feedback.c.source == Source.HUMAN.value,
    )
    statement = sa.select(newest.c.group_id).where(newest.c.kind.in_(_KINDS), is_comparison, ~is_picked)
    return list(c.execute(statement.limit(limit)).scalars())


def repeatable(c: Connection, policy: str, rater_id: str, *, after: int, limit: int) -> list[Picked]:
    """The rater's decisive picks that at least ``after`` newer ones followed and that were not repeated, newest first."""
    own = (feedback.c.policy == policy, feedback.c.rater_id == rater_id)
    newest = (
        sa.select(feedback.c.group_id, feedback.c.shown_order, feedback.c.label, groups.c.kind)
        .select_from(feedback.join(groups))
        .where(
            *own,
            feedback.c.metric == PREFERENCE_METRIC,
            feedback.c.source == Source.HUMAN.value,
            feedback.c.revision == 0,
        )
        .order_by(feedback.c.seq.desc())
        .offset(after)
        .limit(limit)
        .subquery()
    )
    repeat = feedback.alias("repeat")
    is_repeated = sa.exists().where(
        repeat.c.group_id == newest.c.group_id, repeat.c.rater_id == rater_id, repeat.c.metric == REPEAT_METRIC
    )
    decisive = newest.c.label.in_([Label.A.value, Label.B.value])
    statement = sa.select(newest).where(newest.c.kind.in_(_KINDS), decisive, ~is_repeated)
    return [Picked(row.group_id, tuple(row.shown_order)) for row in c.execute(statement)]
