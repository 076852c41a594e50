"""Verdicts of the gate, each with its reasons."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.store.schema import cycles, verdicts
from pairloop.types import Reason, Verdict, VerdictKind


class Given(NamedTuple):
    """A verdict with when it was given and what it was about."""

    cycle_id: str
    duel_id: str | None
    created_at: datetime
    verdict: Verdict


def insert(c: Connection, cycle_id: str, duel_id: str | None, verdict: Verdict, at: datetime) -> None:
    """Append a verdict of a cycle, with the duel it judged, if there was one."""
    c.execute(
        sa.insert(verdicts),
        {
            "cycle_id": cycle_id,
            "duel_id": duel_id,
            "kind": verdict.kind.value,
            "reasons": [asdict(reason) for reason in verdict.reasons],
            "e_value": verdict.e_value,
            "wins": verdict.wins,
            "losses": verdict.losses,
            "ties": verdict.ties,
            "raters": verdict.raters,
            "created_at": at,
        },
    )


def for_cycle(c: Connection, cycle_id: str) -> list[tuple[datetime, Verdict]]:
    """The cycle's verdicts with their times, oldest first."""
    rows = c.execute(sa.select(verdicts).where(verdicts.c.cycle_id == cycle_id).order_by(verdicts.c.seq))
    return [(row.created_at, _verdict(row)) for row in rows]


def latest(c: Connection, policy: str) -> Given | None:
    """What the gate last said, about the newest cycle that it has spoken about."""
    statement = (
        sa.select(verdicts)
        .select_from(cycles.join(verdicts))
        .where(cycles.c.policy == policy)
        .order_by(cycles.c.number.desc(), verdicts.c.seq.desc())
        .limit(1)
    )
    row = c.execute(statement).first()
    return None if row is None else Given(row.cycle_id, row.duel_id, row.created_at, _verdict(row))


def duels_before(c: Connection, policy: str, cycle_number: int) -> int:
    """How many earlier cycles of a policy put their challenger to the vote, live or offline."""
    voted = sa.or_(verdicts.c.duel_id.is_not(None), verdicts.c.wins + verdicts.c.losses + verdicts.c.ties > 0)
    statement = (
        sa.select(sa.func.count(cycles.c.cycle_id.distinct()))
        .select_from(cycles.join(verdicts))
        .where(cycles.c.policy == policy, cycles.c.number < cycle_number, voted)
    )
    return c.execute(statement).scalar_one()


def _verdict(row: Row[Any]) -> Verdict:
    return Verdict(
        kind=VerdictKind(row.kind),
        reasons=tuple(Reason(**reason) for reason in row.reasons),
        e_value=row.e_value,
        wins=row.wins,
        losses=row.losses,
        ties=row.ties,
        raters=row.raters,
    )
