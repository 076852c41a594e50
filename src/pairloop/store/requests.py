"""Requests as an operator looks through them: the newest groups that fit, with what was said about each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection, Row

from pairloop.errors import NotFoundError
from pairloop.store.feedback import labelled
from pairloop.store.schema import completions, feedback, groups
from pairloop.store.store import Store
from pairloop.types import PREFERENCE_METRIC, GroupKind, Label, LabelledGroup, Pool

CHUNK = 1_000
LOOKED_AT_MOST = 5_000
"""A page looks through so many requests; where few of them fit it says so, and `through_all` goes on from there."""


@dataclass(frozen=True, slots=True)
class RequestFilter:
    """What a request must be. ``version``: of an answer; a duel's only once somebody has picked, so that nothing is unblinded.

    ``user`` asked, ``rater`` said something about it; ``since`` (inclusive) and ``until`` (exclusive) are when it was asked.
    ``slower_ms``: an answer took longer than that. Without a ``kind`` all but those in the shadow, which answered nobody.
    """

    version: int | None = None
    pool: Pool | None = None
    kind: GroupKind | None = None
    user: str | None = None
    rater: str | None = None
    has_feedback: bool | None = None
    since: datetime | None = None
    until: datetime | None = None
    slower_ms: int | None = None


class Found(NamedTuple):
    """``after``: the id behind which the next page begins, None at the end; ``is_cut``: there was more to look through."""

    requests: list[LabelledGroup]
    after: str | None
    is_cut: bool
    looked: int


class SoFar(NamedTuple):
    """After one more look: the ``new`` requests of this look; ``looked`` through from the newest until here, of ``there_are``.

    ``after`` and ``is_cut`` as `Found` has them.
    """

    new: list[LabelledGroup]
    looked: int
    there_are: int
    after: str | None
    is_cut: bool


def through_all(
    store: Store, policy: str, wanted: RequestFilter, *, after: str, room: int, most: int = LOOKED_AT_MOST
) -> Iterator[SoFar]:
    """What fits behind the request ``after`` until there are ``room``, look by look, each in a transaction of its own."""
    with store.reading() as c:
        there_are = _number(c, policy, wanted, None)
        looked = there_are - _number(c, policy, wanted, _place(c, policy, after))
    is_cut, place = True, after
    while is_cut and room:
        with store.reading() as c:
            found = page(c, policy, wanted, after=place, limit=room, most=most)
        room, looked, is_cut, place = room - len(found.requests), looked + found.looked, found.is_cut, found.after or place
        yield SoFar(found.requests, looked, there_are, found.after, is_cut)


def page(
    c: Connection, policy: str, wanted: RequestFilter, *, after: str | None = None, limit: int, most: int = LOOKED_AT_MOST
) -> Found:
    """The newest ``limit`` requests that fit, behind the request ``after``; NotFoundError where there is none of that id.

    Reads ``most`` rows of an index at most, whatever is asked for.
    """
    at = None if after is None else _place(c, policy, after)
    found: list[str] = []
    last, looked, is_end = after, 0, False
    while len(found) < limit and looked < most and not is_end:
        chunk = _chunk(c, policy, wanted, at)
        is_end = len(chunk) < CHUNK
        for row in chunk:
            last, at = row.group_id, row
            looked += 1
            if row.fits:
                found.append(row.group_id)
            if len(found) == limit:
                is_end = is_end and row is chunk[-1]
                break
    rows = {one.group.group_id: one for one in labelled(c, sa.select(groups).where(groups.c.group_id.in_(found)))}
    is_cut = len(found) < limit and not is_end
    return Found([rows[group_id] for group_id in found], None if is_end else last, is_cut, looked)


def _chunk(c: Connection, policy: str, wanted: RequestFilter, at: Row[Any] | None) -> list[Row[Any]]:
    """The next rows, newest first, each with whether it fits."""
    fits = sa.case((sa.and_(sa.true(), *_fitting(policy, wanted)), 1), else_=0).label("fits")
    made = groups.c.created_at
    statement = sa.select(groups.c.group_id, made, fits).where(*_behind(policy, wanted, at))
    return list(c.execute(statement.order_by(made.desc(), groups.c.group_id.desc()).limit(CHUNK)))


def _number(c: Connection, policy: str, wanted: RequestFilter, at: Row[Any] | None) -> int:
    """How many rows there are behind a place, whether they fit or not."""
    return c.execute(sa.select(sa.func.count()).select_from(groups).where(*_behind(policy, wanted, at))).scalar_one()


def _behind(policy: str, wanted: RequestFilter, at: Row[Any] | None) -> list[ColumnElement[bool]]:
    made = groups.c.created_at
    conditions = [groups.c.policy == policy]
    if wanted.pool is not None:
        conditions.append(groups.c.pool == wanted.pool.value)
    if wanted.since is not None:
        conditions.append(made >= wanted.since)
    if wanted.until is not None:
        conditions.append(made < wanted.until)
    if at is not None:
        same = sa.and_(made == at.created_at, groups.c.group_id < at.group_id)
        conditions += [made <= at.created_at, sa.or_(made < at.created_at, same)]
    return conditions


def _fitting(policy: str, wanted: RequestFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.kind is None:
        conditions.append(groups.c.kind != GroupKind.SHADOW.value)
    else:
        conditions.append(groups.c.kind == wanted.kind.value)
    if wanted.user is not None:
        conditions.append(groups.c.user == wanted.user)
    if wanted.rater is not None:
        mine = sa.select(feedback.c.group_id).where(feedback.c.policy == policy, feedback.c.rater_id == wanted.rater)
        conditions.append(groups.c.group_id.in_(mine))  # read off an index, once for all rows
    if wanted.has_feedback is not None:
        conditions.append(_said() if wanted.has_feedback else ~_said())
    if wanted.slower_ms is not None:
        timed = completions.alias("timed")
        conditions.append(sa.exists().where(timed.c.group_id == groups.c.group_id, timed.c.total_ms > wanted.slower_ms))
    if wanted.version is not None:
        answer = completions.alias("answer")
        by_it = sa.exists().where(answer.c.group_id == groups.c.group_id, answer.c.version == wanted.version)
        picked = _said(feedback.c.metric == PREFERENCE_METRIC, feedback.c.label != Label.SKIP.value)
        conditions += [by_it, sa.or_(groups.c.kind != GroupKind.DUEL.value, picked)]
    return conditions


def _said(*about: ColumnElement[bool]) -> ColumnElement[bool]:
    return sa.exists().where(feedback.c.group_id == groups.c.group_id, *about)


def _place(c: Connection, policy: str, group_id: str) -> Row[Any]:
    statement = sa.select(groups.c.group_id, groups.c.created_at)
    row = c.execute(statement.where(groups.c.policy == policy, groups.c.group_id == group_id)).first()
    if row is None:
        raise NotFoundError(f"no request {group_id!r}", param="after")
    return cast("Row[Any]", row)
