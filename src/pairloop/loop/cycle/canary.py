"""The canary state: a version that the gate promoted answers a share of the users, until it may answer all or is withdrawn."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from pairloop.errors import ConflictError
from pairloop.loop import deploy
from pairloop.loop.cycle.judging import turning
from pairloop.loop.cycle.turn import Turn
from pairloop.store import canaries, verdicts
from pairloop.store.canaries import Canary
from pairloop.types import CycleState, Verdict, Version


def begin(
    turn: Turn, challenger: Version, champion: Version, verdict: Verdict, step: Mapping[str, Any], *, duel_id: str | None
) -> None:
    """The gate promoted it: now a share of the users. Its duel stays open, since it may yet turn against it."""

    def also(c: Connection, canary: Canary) -> None:
        verdicts.insert(c, turn.cycle.cycle_id, duel_id, verdict, datetime.now(UTC))
        turn.record(c, CycleState.CANARY, {**step, "canary_id": canary.canary_id, "share": canary.share})

    deploy.start_canary(
        turn.loop.store,
        turn.loop.policy,
        turn.loop.config,
        number=challenger.number,
        reason=verdict.text,
        cycle_id=turn.cycle.cycle_id,
        replacing=champion.number,
        also=also,
    )


def look(turn: Turn) -> None:
    """One look at the canary: it goes on, has lasted long enough, or was ended by a guard or by hand."""
    canary = _canary(turn)
    if canary.closed_at is None:
        try:
            _judge(turn, canary)
        except ConflictError:
            canary = _canary(turn)
            if canary.closed_at is None:
                raise
    if canary.closed_at is not None:  # by the watch or by hand, perhaps during this look
        state = CycleState.PROMOTED if canary.outcome == "promoted" else CycleState.REJECTED
        turn.enter(state, {"reason": canary.outcome_reason, "version": canary.version})


def _canary(turn: Turn) -> Canary:
    with turn.loop.store.reading() as c:
        canary = canaries.get(c, turn.recorded(CycleState.CANARY)["canary_id"])
    assert canary is not None, "the step was recorded with its canary"
    return canary


def _judge(turn: Turn, canary: Canary) -> None:
    """Withdraw or promote an open canary where that is due. ConflictError where it is on no more."""
    loop, step = turn.loop, {"version": canary.version}
    with loop.store.reading() as c:
        watched = deploy.canary_standing(c, loop.config, canary, datetime.now(UTC))
        broken = watched.broken or turning(c, loop.config, canary)
    if broken is not None:
        told = {"reason": f"a live guard broke: {broken}", **step, **deploy.evidence(watched)}
        deploy.stop_canary(
            loop.store,
            loop.name,
            reason=told["reason"],
            canary_id=canary.canary_id,
            details=deploy.evidence(watched),
            also=lambda c: turn.record(c, CycleState.REJECTED, told),
        )
    elif watched.is_over:
        reason = f"{canary.reason}; {watched.answers} requests as canary broke no guard"
        deploy.promote(
            loop.store,
            loop.policy,
            turn.version(canary.version),
            reason=reason,
            replacing=canary.champion,
            canary_id=canary.canary_id,
            cycle_id=turn.cycle.cycle_id,
            also=lambda c: turn.record(c, CycleState.PROMOTED, {"reason": reason, **step}),
        )
