"""Raters: whoever gave feedback, as their rows tell."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import NotFoundError
from pairloop.store.schema import feedback


class Rater(NamedTuple):
    """``feedback``: rows about the policy's groups, revisions included."""

    rater_id: str
    feedback: int
    first_at: datetime
    last_at: datetime


def list_(c: Connection, policy: str, *, after: str | None = None, limit: int) -> list[Rater]:
    """By id; those that follow ``after``, at most ``limit``. NotFoundError where nobody of that id gave feedback."""
    if after is not None and get(c, policy, after) is None:
        raise NotFoundError(f"no rater {after!r}", param="after")
    ids = (
        sa.select(feedback.c.rater_id).where(feedback.c.policy == policy).distinct().order_by(feedback.c.rater_id).limit(limit)
    )
    if after is not None:
        ids = ids.where(feedback.c.rater_id > after)
    statement = _summary(policy).where(feedback.c.rater_id.in_(ids)).order_by(feedback.c.rater_id)
    return [_rater(row) for row in c.execute(statement)]


def get(c: Connection, policy: str, rater_id: str) -> Rater | None:
    row = c.execute(_summary(policy).where(feedback.c.rater_id == rater_id)).first()
    return None if row is None else _rater(row)


def _summary(policy: str) -> sa.Select[Any]:
    at = feedback.c.created_at
    counted = sa.select(
        feedback.c.rater_id, sa.func.count().label("rows"), sa.func.min(at).label("first_at"), sa.func.max(at).label("last_at")
    )
    return counted.where(feedback.c.policy == policy).group_by(feedback.c.rater_id)


def _rater(row: Row[Any]) -> Rater:
    return Rater(row.rater_id, row.rows, row.first_at, row.last_at)
