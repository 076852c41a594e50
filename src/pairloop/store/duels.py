"""Duels: when challenger and champion answer side by side in the gate pool.

The duel of a policy is the gate's. Beside it there may be a seed duel of the same challenger against the base, with the same
cycle, opened and closed in the same transactions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import ConflictError, NotFoundError
from pairloop.store import feedback as feedback_rows
from pairloop.store import verdicts
from pairloop.store.schema import completions, cycles, duels, feedback, groups
from pairloop.types import (
    PREFERENCE_METRIC,
    Completion,
    Duel,
    DuelKind,
    Feedback,
    FinishReason,
    Group,
    GroupKind,
    Label,
    LabelledGroup,
    Pool,
    Source,
)

_OPEN = (
    sa.select(duels).where(duels.c.policy == sa.bindparam("policy"), duels.c.closed_at.is_(None)).order_by(duels.c.opened_at)
)

# What votes are made of, and no more: a duel of thousands of picks is read whole whenever the gate looks at it.
_OLDEST_FIRST = (groups.c.created_at, groups.c.group_id)
_MINE = sa.and_(
    groups.c.duel_id == sa.bindparam("duel_id"), sa.exists().where(feedback.c.group_id == groups.c.group_id).correlate(groups)
)
_PICKED = (
    sa.select(
        groups.c.group_id, groups.c.policy, groups.c.user, groups.c.conversation_id, groups.c.metadata, groups.c.created_at
    )
    .where(_MINE)
    .order_by(*_OLDEST_FIRST)
)
_ANSWERS = (
    sa.select(completions.c.group_id, completions.c.text, completions.c.version, completions.c.finish_reason)
    .select_from(groups.join(completions))
    .where(_MINE)
    .order_by(*_OLDEST_FIRST, completions.c.position)
)
_SAID = (
    sa.select(
        feedback.c.group_id,
        feedback.c.feedback_id,
        feedback.c.metric,
        feedback.c.source,
        feedback.c.rater_id,
        feedback.c.created_at,
        feedback.c.label,
        feedback.c.shown_order,
        feedback.c.latency_ms,
    )
    .select_from(groups.join(feedback))
    .where(groups.c.duel_id == sa.bindparam("duel_id"), feedback.c.revision == 0)
    .order_by(*_OLDEST_FIRST, feedback.c.seq)
)


def open(c: Connection, duel: Duel) -> None:
    """Open a duel; ConflictError while the policy has another open one of its kind."""
    other = opened(c, duel.policy).get(duel.kind)
    if other is not None:
        raise ConflictError(f"policy {duel.policy} is duelling already ({other.duel_id}); one duel at a time")
    c.execute(
        sa.insert(duels),
        {
            "duel_id": duel.duel_id,
            "cycle_id": duel.cycle_id,
            "policy": duel.policy,
            "champion": duel.champion,
            "challenger": duel.challenger,
            "opened_at": duel.opened_at,
            "closed_at": duel.closed_at,
            "kind": duel.kind.value,
        },
    )


def close(c: Connection, duel_id: str, at: datetime) -> None:
    """Close a duel; a second time changes nothing. NotFoundError for an unknown one."""
    statement = sa.update(duels).where(duels.c.duel_id == duel_id, duels.c.closed_at.is_(None)).values(closed_at=at)
    if c.execute(statement).rowcount == 0 and get(c, duel_id) is None:
        raise NotFoundError(f"no duel {duel_id}", param="duel_id")


def close_all(c: Connection, policy: str, at: datetime) -> None:
    """Close the open duels of a policy, that against the base with that against the champion."""
    c.execute(sa.update(duels).where(duels.c.policy == policy, duels.c.closed_at.is_(None)).values(closed_at=at))


def get(c: Connection, duel_id: str) -> Duel | None:
    row = c.execute(sa.select(duels).where(duels.c.duel_id == duel_id)).first()
    return None if row is None else _duel(row)


def of_cycle(c: Connection, policy: str, cycle_id: str) -> Duel | None:
    """The duel with its champion of one of the policy's cycles, open or closed."""
    mine = (duels.c.policy == policy, duels.c.cycle_id == cycle_id, duels.c.kind == DuelKind.GATE.value)
    row = c.execute(sa.select(duels).where(*mine)).first()
    return None if row is None else _duel(row)


def current(c: Connection, policy: str) -> Duel | None:
    """The open duel of a policy with its champion."""
    return opened(c, policy).get(DuelKind.GATE)


def opened(c: Connection, policy: str) -> dict[DuelKind, Duel]:
    """The open duels of a policy: none, the gate's, or the gate's and the seed duel beside it."""
    return {duel.kind: duel for duel in map(_duel, c.execute(_OPEN, {"policy": policy}))}


def seed_of(c: Connection, duel: Duel) -> Duel | None:
    """The seed duel that was opened with the gate's ``duel``, open or not; None where there was none."""
    statement = sa.select(duels).where(duels.c.cycle_id == duel.cycle_id, duels.c.kind == DuelKind.SEED.value)
    row = c.execute(statement.limit(1)).first()
    return None if row is None else _duel(row)


def list_(
    c: Connection, policy: str, limit: int = 50, *, after: str | None = None, kind: DuelKind | None = DuelKind.GATE
) -> list[Duel]:
    """Newest first; those that follow the duel ``after``. NotFoundError where there is no such duel. ``kind`` None: both."""
    newest_first = (duels.c.opened_at.desc(), duels.c.duel_id.desc())
    statement = sa.select(duels).where(duels.c.policy == policy).order_by(*newest_first).limit(limit)
    if kind is not None:
        statement = statement.where(duels.c.kind == kind.value)
    if after is not None:
        last = get(c, after)
        if last is None:
            raise NotFoundError(f"no duel {after!r}", param="after")
        same_time = sa.and_(duels.c.opened_at == last.opened_at, duels.c.duel_id < last.duel_id)
        statement = statement.where(sa.or_(duels.c.opened_at < last.opened_at, same_time))
    return [_duel(row) for row in c.execute(statement)]


def counts_of_picks(c: Connection, duel_ids: Collection[str]) -> dict[str, int]:
    """``count_picks`` of each, in one query; those without picks are absent."""
    statement = (
        sa.select(groups.c.duel_id, sa.func.count().label("picks"))
        .select_from(groups.join(feedback))
        .where(groups.c.duel_id.in_(duel_ids), feedback.c.metric == PREFERENCE_METRIC, feedback.c.revision == 0)
        .group_by(groups.c.duel_id)
    )
    return {row.duel_id: row.picks for row in c.execute(statement)}


def picks(c: Connection, duel_id: str) -> Iterator[LabelledGroup]:
    """The duel's groups that have feedback, oldest first, each with what its raters said first.

    A pick reveals which version gave which answer, so here a revision is kept (``feedback.history``) but never counts. The
    gate's e-process needs it, too: it is valid only for a record that grows and never changes.

    One by one, so that of thousands few are objects at a time (PostgreSQL's driver holds their rows); without prompt, tokens
    and sampling, words and tags, for no vote needs them (`picks_about` has them). Three cursors go through the same groups in
    the same order.
    """
    answers, said = (_by_group(c.execute(one, {"duel_id": duel_id})) for one in (_ANSWERS, _SAID))
    for group_id, policy, user, conversation, metadata, at in c.execute(_PICKED, {"duel_id": duel_id}):
        given = tuple(
            Completion(text, version=version, finish_reason=FinishReason(ended))
            for _, text, version, ended in answers(group_id)
        )
        group = Group(
            group_id,
            policy,
            GroupKind.DUEL,
            Pool.GATE,
            "",
            given,
            at,
            user=user,
            conversation_id=conversation,
            duel_id=duel_id,
            metadata=metadata,
        )
        yield LabelledGroup(group, tuple(map(_first_said, said(group_id))))


def _by_group(rows: Iterable[Any]) -> Callable[[str], Iterator[Any]]:
    """The rows of one group after the other: asked for in their order, those of a group without any are none."""
    waiting = groupby(rows, key=itemgetter(0))
    now = next(waiting, None)

    def of(group_id: str) -> Iterator[Any]:
        nonlocal now
        if now is not None and now[0] == group_id:
            yield from now[1]
            now = next(waiting, None)

    return of


def _first_said(row: Any) -> Feedback:
    group_id, feedback_id, metric, source, rater_id, at, label, order, latency_ms = row
    label = None if label is None else Label(label)
    return Feedback(
        feedback_id,
        group_id,
        metric,
        Source(source),
        rater_id,
        at,
        label=label,
        shown_order=tuple(order),
        latency_ms=latency_ms,
    )


def picks_about(c: Connection, group_ids: Collection[str]) -> dict[str, LabelledGroup]:
    """As `picks`, of some groups by their ids, with everything that was asked and said."""
    found = feedback_rows.labelled(
        c, sa.select(groups).where(groups.c.group_id.in_(group_ids)), counting=feedback_rows.first_revisions
    )
    return {labelled.group.group_id: labelled for labelled in found}


def count_picks(c: Connection, duel_id: str) -> int:
    """Preferences about the duel's groups, whatever their label; revisions count once."""
    statement = (
        sa.select(sa.func.count())
        .select_from(groups.join(feedback))
        .where(groups.c.duel_id == duel_id, feedback.c.metric == PREFERENCE_METRIC, feedback.c.revision == 0)
    )
    return c.execute(statement).scalar_one()


def number(c: Connection, duel: Duel) -> int:
    """The how manieth duel of its policy this is, from 1; those that were held offline count."""
    at = c.execute(sa.select(cycles.c.number).where(cycles.c.cycle_id == duel.cycle_id)).scalar_one()
    return verdicts.duels_before(c, duel.policy, at) + 1


def _duel(row: Row[Any]) -> Duel:
    return Duel(
        duel_id=row.duel_id,
        cycle_id=row.cycle_id,
        policy=row.policy,
        champion=row.champion,
        challenger=row.challenger,
        opened_at=row.opened_at,
        closed_at=row.closed_at,
        kind=DuelKind(row.kind),
    )
