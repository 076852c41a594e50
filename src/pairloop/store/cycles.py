"""Cycles: one row each, and one appended row for each state they enter."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import ConflictError, NotFoundError
from pairloop.store import events
from pairloop.store.schema import cycle_steps, cycles, verdicts
from pairloop.types import Cycle, CycleState, CycleStep


def insert(c: Connection, cycle: Cycle) -> None:
    """Write a cycle with the steps it has; ConflictError while the policy's last cycle has not ended."""
    running = current(c, cycle.policy)
    if running is not None:
        raise ConflictError(f"cycle {running.cycle_id} of {cycle.policy} is {running.state}; one cycle at a time")
    if not cycle.steps:
        raise ValueError("a cycle is written with its first step")
    c.execute(
        sa.insert(cycles),
        {
            "cycle_id": cycle.cycle_id,
            "policy": cycle.policy,
            "number": cycle.number,
            "parent": cycle.parent,
            "trigger": cycle.trigger,
            "created_at": cycle.created_at,
        },
    )
    c.execute(sa.insert(cycle_steps), [_step_row(cycle.cycle_id, position, step) for position, step in enumerate(cycle.steps)])
    events.cycle_started(c, cycle)


def step(c: Connection, cycle_id: str, step: CycleStep) -> None:
    """Append a step; NotFoundError for an unknown cycle, ConflictError for one that has ended."""
    last = c.execute(
        sa.select(cycle_steps.c.position, cycle_steps.c.state)
        .where(cycle_steps.c.cycle_id == cycle_id)
        .order_by(cycle_steps.c.position.desc())
        .limit(1)
    ).first()
    if last is None:
        raise NotFoundError(f"no cycle {cycle_id}", param="cycle_id")
    if CycleState(last.state).is_terminal:
        raise ConflictError(f"cycle {cycle_id} has ended ({last.state}); it takes no step to {step.state}")
    c.execute(sa.insert(cycle_steps), _step_row(cycle_id, last.position + 1, step))
    events.cycle_moved(c, cycle_id, step)


def get(c: Connection, cycle_id: str) -> Cycle | None:
    return _first(c, sa.select(cycles).where(cycles.c.cycle_id == cycle_id))


def current(c: Connection, policy: str) -> Cycle | None:
    """The policy's cycle that has not ended; only its newest can be one."""
    newest = _first(c, _newest_first(policy).limit(1))
    return None if newest is None or newest.state.is_terminal else newest


def list_(c: Connection, policy: str, limit: int = 50, *, after: str | None = None) -> list[Cycle]:
    """Newest first; those that follow the cycle ``after``. NotFoundError where the policy has no such cycle."""
    statement = _newest_first(policy).limit(limit)
    return _load(c, statement if after is None else statement.where(cycles.c.number < _number(c, policy, after)))


def numbered(c: Connection, policy: str, number: int) -> Cycle | None:
    return _first(c, sa.select(cycles).where(cycles.c.policy == policy, cycles.c.number == number))


def judged(c: Connection, policy: str, limit: int, *, before: int | None = None, kind: str | None = None) -> list[Cycle]:
    """Cycles that the gate has spoken about, newest first, those numbered below ``before``; ``kind``: of its last verdict."""
    last = verdicts.alias("last")
    newest = sa.select(sa.func.max(last.c.seq)).where(last.c.cycle_id == cycles.c.cycle_id).correlate(cycles).scalar_subquery()
    spoken = sa.exists().where(verdicts.c.seq == newest)
    statement = _newest_first(policy).where(spoken if kind is None else spoken.where(verdicts.c.kind == kind)).limit(limit)
    return _load(c, statement if before is None else statement.where(cycles.c.number < before))


def with_verdicts(c: Connection, policy: str, limit: int, *, after: str | None = None) -> list[str]:
    """Ids of the cycles that the gate has spoken about, newest first; those that follow the cycle ``after``."""
    spoken = sa.exists().where(verdicts.c.cycle_id == cycles.c.cycle_id)
    statement = _newest_first(policy).with_only_columns(cycles.c.cycle_id).where(spoken).limit(limit)
    if after is not None:
        statement = statement.where(cycles.c.number < _number(c, policy, after))
    return list(c.execute(statement).scalars())


def next_number(c: Connection, policy: str) -> int:
    """Cycles are numbered from 1 per policy."""
    highest: int | None = c.execute(sa.select(sa.func.max(cycles.c.number)).where(cycles.c.policy == policy)).scalar()
    return 1 if highest is None else highest + 1


def _number(c: Connection, policy: str, cycle_id: str) -> int:
    wanted = sa.select(cycles.c.number).where(cycles.c.policy == policy, cycles.c.cycle_id == cycle_id)
    number: int | None = c.execute(wanted).scalar()
    if number is None:
        raise NotFoundError(f"no cycle {cycle_id!r}", param="after")
    return number


def _newest_first(policy: str) -> sa.Select[Any]:
    return sa.select(cycles).where(cycles.c.policy == policy).order_by(cycles.c.number.desc())


def _first(c: Connection, statement: sa.Select[Any]) -> Cycle | None:
    return next(iter(_load(c, statement)), None)


def _load(c: Connection, statement: sa.Select[Any]) -> list[Cycle]:
    rows = c.execute(statement).all()
    if not rows:
        return []
    steps: dict[str, list[CycleStep]] = {row.cycle_id: [] for row in rows}
    wanted = sa.select(cycle_steps).where(cycle_steps.c.cycle_id.in_(list(steps)))
    for row in c.execute(wanted.order_by(cycle_steps.c.cycle_id, cycle_steps.c.position)):
        steps[row.cycle_id].append(CycleStep(CycleState(row.state), row.record, row.created_at))
    return [_cycle(row, tuple(steps[row.cycle_id])) for row in rows]


def _step_row(cycle_id: str, position: int, step: CycleStep) -> dict[str, Any]:
    return {
        "cycle_id": cycle_id,
        "position": position,
        "state": step.state.value,
        "record": dict(step.record),
        "created_at": step.created_at,
    }


def _cycle(row: Row[Any], steps: tuple[CycleStep, ...]) -> Cycle:
    return Cycle(
        cycle_id=row.cycle_id,
        policy=row.policy,
        number=row.number,
        parent=row.parent,
        trigger=row.trigger,
        created_at=row.created_at,
        steps=steps,
    )
