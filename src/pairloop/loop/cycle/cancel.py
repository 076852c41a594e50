"""A cycle ended by hand before the gate has spoken: the champion stays, and the picks stay usable.

Another process that has the challenger loaded, a server beside the command line say, lets go of it when it sees that the cycle
ended: see ``unloading``.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from pairloop.errors import ConflictError, NotFoundError
from pairloop.loop import deploy, train
from pairloop.loop.cycle.status import challenger_of
from pairloop.policy.protocols import Policy
from pairloop.store import Store, audit, cycles, duels, runs, versions
from pairloop.store.audit import AuditAction
from pairloop.types import Alias, Cycle, CycleState, CycleStep, RunStatus


def cancel(store: Store, cycle_id: str, *, reason: str, actor: str, policy: Policy | None = None) -> Cycle:
    """End a cycle as held: its training stops within seconds, its duel is closed, its challenger archived.

    All in one transaction. Whoever moves the cycle meanwhile, in this process or another one, finds out at its next write and
    writes nothing more. With ``policy`` the challenger is unloaded. ConflictError where the cycle has ended or is a canary,
    NotFoundError where there is none.
    """
    reason = store.kept_words(reason)

    def commit(c: Connection) -> int | None:
        found = cycles.get(c, cycle_id)
        if found is None:
            raise NotFoundError(f"no cycle {cycle_id!r}", param="cycle_id")
        if found.state.is_terminal:
            raise ConflictError(f"cycle {found.number} has ended already, as {found.state}")
        if found.state is CycleState.CANARY:
            raise ConflictError(f"cycle {found.number} was promoted to a canary; stop that instead: POST .../canary/stop")
        duel = duels.of_cycle(c, found.policy, cycle_id)
        made = challenger_of(found, duel)
        if made is not None and versions.alias(c, found.policy, Alias.CHAMPION) == made:
            raise ConflictError(f"version {made} of cycle {found.number} was promoted by hand; the cycle ends by itself")
        return _end(c, found, reason, actor, datetime.now(UTC))

    challenger = store.write(commit)
    if policy is not None and challenger is not None:
        policy.unload(challenger)
    with store.reading() as c:
        run = runs.for_cycle(c, cycle_id)
    if run is not None:
        train.forget(store.artifacts, runs.folder_name(run))
    with store.reading() as c:
        ended = cycles.get(c, cycle_id)
    assert ended is not None, "cycles are never deleted"
    return ended


def _end(c: Connection, cycle: Cycle, reason: str, actor: str, at: datetime) -> int | None:
    """Its challenger, where it has one."""
    text = f"cancelled: {reason}"
    run, duel = runs.for_cycle(c, cycle.cycle_id), duels.of_cycle(c, cycle.policy, cycle.cycle_id)
    challenger = challenger_of(cycle, duel)
    if run is not None and run.status is RunStatus.RUNNING:
        runs.end(c, run.run_id, RunStatus.CANCELLED, {}, text, at)
    if duel is not None and duel.closed_at is None:
        deploy.end_duel(c, cycle.policy, at)
    record: dict[str, Any] = {"reason": text, "cancelled": True}
    if challenger is not None:
        record["version"] = challenger
        champion = versions.alias(c, cycle.policy, Alias.CHAMPION)
        versions.record_promotion(
            c,
            cycle.policy,
            number=challenger,
            previous=champion,
            action="retire",
            reason=text,
            cycle_id=cycle.cycle_id,
            at=at,
        )
    cycles.step(c, cycle.cycle_id, CycleStep(CycleState.HELD, record, at))
    subject, details = f"cycle {cycle.number} of {cycle.policy}", {"cycle_id": cycle.cycle_id, "was": cycle.state.value}
    audit.record(c, AuditAction.CYCLE_CANCEL, actor=actor, subject=subject, reason=reason, details=details, at=at)
    return challenger
