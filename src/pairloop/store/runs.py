"""Training runs: who holds each, how far it is, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import ConflictError, NotFoundError
from pairloop.store import events
from pairloop.store.schema import runs
from pairloop.types import Run, RunStatus


def insert(c: Connection, run: Run) -> None:
    c.execute(
        sa.insert(runs),
        {
            "run_id": run.run_id,
            "policy": run.policy,
            "cycle_id": run.cycle_id,
            "dataset_id": run.dataset_id,
            "parent": run.parent,
            "status": run.status.value,
            "owner": run.owner,
            "attempt": run.attempt,
            "lease_expires_at": run.lease_expires_at,
            "heartbeat_at": run.heartbeat_at,
            "progress": dict(run.progress),
            "result": dict(run.result),
            "error": run.error,
            "created_at": run.created_at,
        },
    )


def get(c: Connection, run_id: str) -> Run | None:
    row = c.execute(sa.select(runs).where(runs.c.run_id == run_id)).first()
    return None if row is None else _run(row)


def for_cycle(c: Connection, cycle_id: str) -> Run | None:
    """The cycle's latest attempt."""
    statement = sa.select(runs).where(runs.c.cycle_id == cycle_id)
    row = c.execute(statement.order_by(runs.c.attempt.desc(), runs.c.created_at.desc()).limit(1)).first()
    return None if row is None else _run(row)


def heartbeat(
    c: Connection, run_id: str, *, owner: str, at: datetime, lease_expires_at: datetime, progress: Mapping[str, Any]
) -> None:
    """Record that the owner is alive, and how far it is; ConflictError where the run has ended or has another owner."""
    statement = sa.update(runs).where(runs.c.run_id == run_id, runs.c.owner == owner, runs.c.status == RunStatus.RUNNING.value)
    _update_one(c, run_id, statement.values(heartbeat_at=at, lease_expires_at=lease_expires_at, progress=dict(progress)))


def end(c: Connection, run_id: str, status: RunStatus, result: Mapping[str, Any], error: str | None, at: datetime) -> None:
    """Record how a run ended, once; ConflictError where it has ended already."""
    statement = sa.update(runs).where(runs.c.run_id == run_id, runs.c.status == RunStatus.RUNNING.value)
    _update_one(c, run_id, statement.values(status=status.value, result=dict(result), error=error, heartbeat_at=at))
    if status in (RunStatus.USER_ERROR, RunStatus.SYSTEM_ERROR):
        run = get(c, run_id)
        assert run is not None, "it has just been changed"
        events.run_failed(c, run, at)


def list_(c: Connection, policy: str, limit: int | None = None, *, after: str | None = None) -> list[Run]:
    """Newest first; those that follow the run ``after``. NotFoundError where there is no such run."""
    statement = sa.select(runs).where(runs.c.policy == policy).order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
    if after is not None:
        last = get(c, after)
        if last is None:
            raise NotFoundError(f"no run {after!r}", param="after")
        same_time = sa.and_(runs.c.created_at == last.created_at, runs.c.run_id < last.run_id)
        statement = statement.where(sa.or_(runs.c.created_at < last.created_at, same_time))
    return [_run(row) for row in c.execute(statement.limit(limit))]


def parents(c: Connection, policy: str) -> set[int]:
    """Versions that runs train on which have not ended."""
    statement = sa.select(runs.c.parent).where(runs.c.policy == policy, runs.c.status == RunStatus.RUNNING.value)
    return set(c.execute(statement).scalars())


def folder_name(run: Run) -> str:
    """The first attempt's id: under it lie a run's files on the machine that trains it, and the checkpoints that it shares."""
    return str(run.progress.get("folder", run.run_id))


def open_folders(c: Connection) -> set[str]:
    """The `folder_name` of each run that has not ended."""
    rows = c.execute(sa.select(runs).where(runs.c.status == RunStatus.RUNNING.value))
    return {folder_name(_run(row)) for row in rows}


def _update_one(c: Connection, run_id: str, statement: sa.Update) -> None:
    if c.execute(statement).rowcount == 1:
        return
    run = get(c, run_id)
    if run is None:
        raise NotFoundError(f"no run {run_id}", param="run_id")
    raise ConflictError(f"run {run_id} is {run.status}, held by {run.owner}; another process took it over or ended it")


def _run(row: Row[Any]) -> Run:
    return Run(
        run_id=row.run_id,
        policy=row.policy,
        cycle_id=row.cycle_id,
        dataset_id=row.dataset_id,
        parent=row.parent,
        status=RunStatus(row.status),
        owner=row.owner,
        attempt=row.attempt,
        lease_expires_at=row.lease_expires_at,
        heartbeat_at=row.heartbeat_at,
        progress=row.progress,
        result=row.result,
        error=row.error,
        created_at=row.created_at,
    )
