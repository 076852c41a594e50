"""Gold items: comparisons whose answer is known, which the labelling queue mixes in to measure its raters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import NotFoundError
from pairloop.store.schema import completions, feedback, gold_items, groups
from pairloop.types import GOLD_METRIC, PREFERENCE_METRIC, RELABELLED_TAG, GroupKind, Label, Source


class Origin(StrEnum):
    """Who knows the answer: an operator said it, or all who picked agreed."""

    OPERATOR = "operator"
    UNANIMOUS = "unanimous"


@dataclass(frozen=True, slots=True)
class Gold:
    """A comparison whose better answer is ``label``, A or B, and why that is known."""

    group_id: str
    policy: str
    label: Label
    origin: Origin
    reason: str
    created_at: datetime


class Answered(NamedTuple):
    """What somebody first said of a gold item, beside what is right."""

    group_id: str
    rater_id: str
    label: Label
    right: Label


class Agreed(NamedTuple):
    """A comparison of which ``raters`` different people said the same, and nobody anything else."""

    group_id: str
    label: Label
    raters: int


def insert(c: Connection, gold: Gold) -> None:
    c.execute(sa.insert(gold_items), {**asdict(gold), "label": gold.label.value, "origin": gold.origin.value})


def get(c: Connection, group_id: str) -> Gold | None:
    row = c.execute(sa.select(gold_items).where(gold_items.c.group_id == group_id)).first()
    return None if row is None else _gold(row)


def remove(c: Connection, group_id: str) -> None:
    """The comparison is no gold any more; what was said of it counts no more, and stays."""
    c.execute(sa.delete(gold_items).where(gold_items.c.group_id == group_id))


def list_(c: Connection, policy: str, *, after: str | None = None, limit: int) -> list[Gold]:
    """Newest first; those that follow ``after``. NotFoundError where that is no gold item."""
    statement = sa.select(gold_items).where(gold_items.c.policy == policy)
    if after is not None:
        last = get(c, after)
        if last is None:
            raise NotFoundError(f"no gold item {after!r}", param="after")
        at, group_id = gold_items.c.created_at, gold_items.c.group_id
        statement = statement.where(sa.or_(at < last.created_at, sa.and_(at == last.created_at, group_id < after)))
    statement = statement.order_by(gold_items.c.created_at.desc(), gold_items.c.group_id.desc())
    return [_gold(row) for row in c.execute(statement.limit(limit))]


def count(c: Connection, policy: str) -> int:
    return c.execute(sa.select(sa.func.count()).select_from(gold_items).where(gold_items.c.policy == policy)).scalar_one()


def answers(c: Connection, policy: str) -> list[Answered]:
    """What people first said of the gold items, skips left out."""
    statement = (
        sa.select(feedback.c.group_id, feedback.c.rater_id, feedback.c.label, gold_items.c.label.label("right"))
        .select_from(gold_items.join(feedback, feedback.c.group_id == gold_items.c.group_id))
        .where(
            gold_items.c.policy == policy,
            feedback.c.metric == GOLD_METRIC,
            feedback.c.revision == 0,
            feedback.c.label != Label.SKIP.value,
        )
    )
    return [Answered(row.group_id, row.rater_id, Label(row.label), Label(row.right)) for row in c.execute(statement)]


def unanimous(c: Connection, policy: str, *, min_raters: int, newest: int, limit: int) -> list[Agreed]:
    """Comparisons of the ``newest`` rows of feedback from which so many people picked the same answer, and none another.

    A tie and "both bad" count as another answer, a skip as none. Most raters first. Neither duels nor gold items, nor what an
    operator relabelled.
    """
    recent = sa.select(feedback.c.group_id).where(feedback.c.policy == policy).order_by(feedback.c.seq.desc()).limit(newest)
    touched = sa.select(recent.subquery().c.group_id).distinct()
    later = feedback.alias("later")
    revised = sa.exists().where(
        later.c.group_id == feedback.c.group_id,
        later.c.rater_id == feedback.c.rater_id,
        later.c.metric == feedback.c.metric,
        later.c.revision > feedback.c.revision,
    )
    other = feedback.alias("other")
    relabelled = sa.exists().where(
        other.c.group_id == feedback.c.group_id, sa.cast(other.c.tags, sa.Text).like(f'%"{RELABELLED_TAG}":%')
    )
    people = sa.func.count(feedback.c.rater_id.distinct())
    said = sa.func.count(feedback.c.label.distinct())
    statement = (
        sa.select(feedback.c.group_id, sa.func.min(feedback.c.label).label("label"), people.label("raters"))
        .where(
            feedback.c.group_id.in_(touched),
            feedback.c.metric == PREFERENCE_METRIC,
            feedback.c.source == Source.HUMAN.value,
            feedback.c.label != Label.SKIP.value,
            ~revised,
            ~relabelled,
            ~sa.exists().where(gold_items.c.group_id == feedback.c.group_id),
            ~sa.exists().where(groups.c.group_id == feedback.c.group_id, groups.c.kind == GroupKind.DUEL.value),
            sa.exists().where(completions.c.group_id == feedback.c.group_id, completions.c.position == 1),
        )
        .group_by(feedback.c.group_id)
        .having(people >= min_raters, said == 1, sa.func.min(feedback.c.label).in_([Label.A.value, Label.B.value]))
        .order_by(people.desc(), feedback.c.group_id.desc())
    )
    return [Agreed(row.group_id, Label(row.label), row.raters) for row in c.execute(statement.limit(limit))]


def _gold(row: Row[Any]) -> Gold:
    return Gold(row.group_id, row.policy, Label(row.label), Origin(row.origin), row.reason, row.created_at)
