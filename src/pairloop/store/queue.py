"""What may be shown to a rater: comparisons that want picks, and those that this rater picked from."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection, Select

from pairloop.store.schema import completions, feedback, gold_items, groups, reservations
from pairloop.types import GOLD_METRIC, PREFERENCE_METRIC, REPEAT_METRIC, GroupKind, Label, Pool, Source

NEWEST = 2_000
"""So many of a pool's newest groups are looked at, so that a store in which all is labelled is not read through."""

_KINDS = (GroupKind.TRAIN.value, GroupKind.HELDOUT.value)
"""Not duels: who has picked from one was told its versions."""
_SAID = (PREFERENCE_METRIC, REPEAT_METRIC, GOLD_METRIC)
_PEOPLE = Source.HUMAN.value


class Picked(NamedTuple):
    """A decisive pick: the group, and the order in which its answers were shown."""

    group_id: str
    shown_order: tuple[int, ...]


class Vote(NamedTuple):
    """What a person said of a comparison."""

    group_id: str
    rater_id: str
    label: Label


class Asking(NamedTuple):
    """Who asks the queue of ``policy`` at ``now``, where ``reviewers`` different people pick from each comparison."""

    policy: str
    rater_id: str
    reviewers: int
    now: datetime


class Left(NamedTuple):
    """Of a pool's newest comparisons: those that want picks yet, and those of them that somebody is shown now."""

    open: int
    reserved: int


def wanting(c: Connection, asking: Asking, pool: Pool, limit: int) -> list[str]:
    """Ids of the pool's comparisons that this rater may be shown as new ones, newest first.

    Each wants a pick yet, counting those that others are shown right now, and this rater has said nothing of it.
    """
    newest, wants = _wanting(asking.policy, pool, asking.reviewers, asking.now, asking.rater_id)
    own = sa.exists().where(
        feedback.c.group_id == newest.c.group_id,
        feedback.c.rater_id == asking.rater_id,
        feedback.c.metric.in_([PREFERENCE_METRIC, GOLD_METRIC]),
    )
    statement = sa.select(newest.c.group_id).where(*wants, ~own).order_by(newest.c.created_at.desc())
    return list(c.execute(statement.limit(limit)).scalars())


def has_room(c: Connection, asking: Asking, group_id: str, *, is_sent: bool = False) -> bool:
    """Whether a comparison wants one more pick, beside those that others are shown right now.

    One that was sent to the queue wants one, whoever picked from it before.
    """
    spoken = asking.reviewers - 1 if is_sent else c.execute(_picks(sa.literal(group_id))).scalar_one()
    held = sa.select(sa.func.count()).where(
        *_held(sa.literal(group_id), asking.now), reservations.c.rater_id != asking.rater_id
    )
    return bool(spoken + c.execute(held).scalar_one() < asking.reviewers)


def left(c: Connection, policy: str, pool: Pool, *, reviewers: int, now: datetime) -> Left:
    """How much is left in a pool; of its `NEWEST` groups."""
    newest, wants = _wanting(policy, pool, reviewers, now, None)
    held = sa.exists().where(*_held(newest.c.group_id, now))
    row = c.execute(
        sa.select(sa.func.count(), sa.func.sum(sa.case((held, 1), else_=0))).select_from(newest).where(*wants)
    ).one()
    return Left(row[0], row[1] or 0)


def _wanting(
    policy: str, pool: Pool, reviewers: int, now: datetime, rater_id: str | None
) -> tuple[sa.Subquery, Sequence[ColumnElement[bool]]]:
    """The pool's newest groups, and what is true of those that want picks; for a rater, beside what others are shown."""
    newest = (
        sa.select(groups.c.group_id, groups.c.kind, groups.c.created_at)
        .where(groups.c.policy == policy, groups.c.pool == pool.value)
        .order_by(groups.c.created_at.desc())
        .limit(NEWEST)
        .subquery()
    )
    is_comparison = sa.exists().where(completions.c.group_id == newest.c.group_id, completions.c.position == 1)
    is_gold = sa.exists().where(gold_items.c.group_id == newest.c.group_id)
    spoken = _picks(newest.c.group_id)
    if rater_id is not None:
        held: Select[Any] = sa.select(sa.func.count()).where(
            *_held(newest.c.group_id, now), reservations.c.rater_id != rater_id
        )
        is_left = spoken.scalar_subquery() + held.scalar_subquery() < reviewers
    else:
        is_left = spoken.scalar_subquery() < reviewers
    return newest, (newest.c.kind.in_(_KINDS), is_comparison, ~is_gold, is_left)


def _picks(group_id: ColumnElement[str]) -> Select[Any]:
    """How many people have picked from a group; who skipped it has not."""
    return sa.select(sa.func.count(feedback.c.rater_id.distinct())).where(
        feedback.c.group_id == group_id,
        feedback.c.metric == PREFERENCE_METRIC,
        feedback.c.source == _PEOPLE,
        feedback.c.label != Label.SKIP.value,
    )


def _held(group_id: ColumnElement[str], now: datetime) -> tuple[ColumnElement[bool], ...]:
    """Reservations of a group that hold."""
    return (reservations.c.group_id == group_id, reservations.c.done_at.is_(None), reservations.c.expires_at > now)


def gold(c: Connection, policy: str, rater_id: str, limit: int) -> list[str]:
    """Ids of gold items of which this rater has said nothing, newest first."""
    own = sa.exists().where(
        feedback.c.group_id == gold_items.c.group_id,
        feedback.c.rater_id == rater_id,
        feedback.c.metric.in_([PREFERENCE_METRIC, GOLD_METRIC]),
    )
    statement = sa.select(gold_items.c.group_id).where(gold_items.c.policy == policy, ~own)
    return list(c.execute(statement.order_by(gold_items.c.created_at.desc()).limit(limit)).scalars())


def votes(c: Connection, policy: str, newest: int) -> list[Vote]:
    """The newest first votes of people, skips among them."""
    rows = _answers(policy, [PREFERENCE_METRIC]).add_columns(feedback.c.rater_id, feedback.c.label)
    return [Vote(row[0], row[1], Label(row[2])) for row in c.execute(rows.order_by(feedback.c.seq.desc()).limit(newest))]


def done_since(c: Connection, policy: str, since: datetime, *, newest: int) -> tuple[dict[str, int], int]:
    """Answers of people by rater, gold and repeats among them, of the newest ones; and how many of those were looked at."""
    rows = _answers(policy, _SAID).add_columns(feedback.c.rater_id, feedback.c.created_at)
    recent = rows.order_by(feedback.c.seq.desc()).limit(newest).subquery()
    by_rater = sa.select(recent.c.rater_id, sa.func.count()).where(recent.c.created_at >= since).group_by(recent.c.rater_id)
    looked_at = c.execute(sa.select(sa.func.count()).select_from(recent)).scalar_one()
    return {row[0]: row[1] for row in c.execute(by_rater)}, looked_at


def done_by(c: Connection, policy: str, rater_id: str) -> int:
    """All answers of one rater."""
    mine = _answers(policy, _SAID).where(feedback.c.rater_id == rater_id).subquery()
    return c.execute(sa.select(sa.func.count()).select_from(mine)).scalar_one()


def _answers(policy: str, metrics: Sequence[str]) -> Select[Any]:
    return sa.select(feedback.c.group_id).where(
        feedback.c.policy == policy,
        feedback.c.metric.in_(metrics),
        feedback.c.source == _PEOPLE,
        feedback.c.revision == 0,
    )


def repeatable(c: Connection, policy: str, rater_id: str, *, after: int, limit: int) -> list[Picked]:
    """The rater's decisive picks that at least ``after`` newer ones followed and that were not repeated, newest first."""
    own = (feedback.c.policy == policy, feedback.c.rater_id == rater_id)
    newest = (
        sa.select(feedback.c.seq, feedback.c.group_id, feedback.c.shown_order, feedback.c.label, groups.c.kind)
        .select_from(feedback.join(groups))
        .where(*own, feedback.c.metric == PREFERENCE_METRIC, feedback.c.source == _PEOPLE, feedback.c.revision == 0)
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
    statement = sa.select(newest).where(newest.c.kind.in_(_KINDS), decisive, ~is_repeated).order_by(newest.c.seq.desc())
    return [Picked(row.group_id, tuple(row.shown_order)) for row in c.execute(statement)]
