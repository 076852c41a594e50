"""What happened, told apart from the evidence for those who want to hear of it: one row, in the transaction of the act itself.

Numbers, names and reasons only: no prompt, answer, comment or name of a rater.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.store.ids import new_wire_id
from pairloop.store.schema import cycles, events
from pairloop.types import Cycle, CycleState, CycleStep, Run

BACKUP = "backup.taken"
LONGEST_REASON = 500
_CHANGES = {"promote": "version.promoted", "rollback": "version.rolled_back"}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; ``event_id`` stays the same however often it is told."""

    seq: int
    event_id: str
    type: str
    policy: str
    data: Mapping[str, Any]
    created_at: datetime


def put(c: Connection, kind: str, policy: str, data: Mapping[str, Any], at: datetime) -> str:
    """Append an event; its id."""
    event_id = new_wire_id("evt_")
    row = {"event_id": event_id, "type": kind, "policy": policy, "data": dict(data), "created_at": at}
    c.execute(sa.insert(events), row)
    return event_id


def get(c: Connection, event_id: str) -> Event | None:
    row = c.execute(sa.select(events).where(events.c.event_id == event_id)).first()
    return None if row is None else event_of(row)


def newest_at(c: Connection, kind: str) -> datetime | None:
    """When something of this kind last happened to any policy of the database."""
    found: datetime | None = c.execute(sa.select(sa.func.max(events.c.created_at)).where(events.c.type == kind)).scalar()
    return found


def newest_seq(c: Connection) -> int:
    """0 where nothing has happened yet."""
    found: int | None = c.execute(sa.select(sa.func.max(events.c.seq))).scalar()
    return found or 0


def event_of(row: Row[Any]) -> Event:
    return Event(row.seq, row.event_id, row.type, row.policy, row.data, row.created_at)


def cycle_started(c: Connection, cycle: Cycle) -> None:
    data = {"id": cycle.cycle_id, "policy": cycle.policy, "number": cycle.number, "trigger": cycle.trigger}
    put(c, "cycle.started", cycle.policy, {**data, "parent": cycle.parent}, cycle.created_at)


def cycle_moved(c: Connection, cycle_id: str, step: CycleStep) -> None:
    """Tell of a step that others wait for: the duel, the end, and what the gate held."""
    if step.state is not CycleState.DUELLING and not step.state.is_terminal:
        return
    cycle = c.execute(sa.select(cycles.c.policy, cycles.c.number).where(cycles.c.cycle_id == cycle_id)).one()
    data: dict[str, Any] = {"id": cycle_id, "policy": cycle.policy, "number": cycle.number}
    if step.state is CycleState.DUELLING:
        duel = {"duel_id": step.record.get("duel_id"), "challenger": step.record.get("version")}
        put(c, "duel.opened", cycle.policy, data | duel, step.created_at)
        return
    reason = step.record.get("reason")
    data |= {"state": step.state.value, "version": step.record.get("version"), "reason": _short(reason)}
    put(c, "cycle.ended", cycle.policy, data, step.created_at)
    if step.state is CycleState.HELD and not step.record.get("cancelled"):
        put(c, "gate.held", cycle.policy, data, step.created_at)


def version_changed(
    c: Connection, policy: str, *, number: int, previous: int | None, action: str, reason: str, at: datetime
) -> None:
    if action in _CHANGES:
        data = {"id": f"{policy}@{number}", "policy": policy, "number": number, "previous": previous, "reason": _short(reason)}
        put(c, _CHANGES[action], policy, data, at)


def guard_broken(c: Connection, policy: str, number: int, evidence: Mapping[str, Any], reason: str, at: datetime) -> None:
    """Tell of a version that live guards took out of traffic, where that is what ``evidence`` says."""
    if "guards" in evidence:
        data = {"id": f"{policy}@{number}", "policy": policy, "number": number, "reason": _short(reason)}
        put(c, "guard.broken", policy, data, at)


def run_failed(c: Connection, run: Run, at: datetime) -> None:
    """Of the error only its code: its text may quote what the training process read."""
    error: Mapping[str, Any] = run.result.get("error") or {}
    data = {"id": run.run_id, "policy": run.policy, "cycle_id": run.cycle_id, "status": run.status.value}
    put(c, "run.failed", run.policy, {**data, "code": error.get("code")}, at)


def _short(reason: Any) -> str | None:
    """The first line: what follows may be the last words of a training process."""
    return None if reason is None else str(reason).partition("\n")[0][:LONGEST_REASON]
