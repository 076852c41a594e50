"""Fine-tuning jobs: one row each, which changes until the job has ended, and their events, which are only appended.

A job is held by the worker that moves it (``owner``, with a lease that the worker renews). Every write of a worker names
itself as the owner, so one that lost its job, or whose job was cancelled or paused meanwhile, finds out and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import NotFoundError
from pairloop.store.events import put as tell
from pairloop.store.ids import new_wire_id
from pairloop.store.schema import job_events, jobs


class JobStatus(StrEnum):
    """As on the wire; a paused job is ``queued``."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


_OPEN = tuple(status.value for status in JobStatus if not status.is_terminal)

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


@dataclass(frozen=True, slots=True)
class Job:
    """A fine-tuning job. ``policy`` and ``parent``: the version that it starts from; ``model``: how the client called it.

    ``base_model``: where that is not this server's own policy, the model whose lineage ``policy`` then is. ``method``: as on
    the wire, "auto" resolved once the files are validated. ``progress``: step, of, when it is expected to end.
    """

    job_id: str
    status: JobStatus
    model: str
    policy: str
    parent: int
    training_file: str
    method: Mapping[str, Any]
    seed: int
    created_at: datetime
    base_model: str | None = None
    validation_file: str | None = None
    suffix: str | None = None
    metadata: Mapping[str, str] | None = None
    paused: bool = False
    owner: str | None = None
    lease_expires_at: datetime | None = None
    heartbeat_at: datetime | None = None
    attempt: int = 0
    progress: Mapping[str, Any] = field(default_factory=dict)
    dataset_id: str | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    result_files: Sequence[str] = ()
    error: Mapping[str, Any] | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One thing that happened to a job."""

    event_id: str
    job_id: str
    level: Level
    type: EventType
    message: str
    data: Mapping[str, Any]
    created_at: datetime


def insert(c: Connection, job: Job) -> None:
    c.execute(sa.insert(jobs), {column.name: _plain(getattr(job, column.name)) for column in jobs.columns})


def get(c: Connection, job_id: str, *, lock: bool = False) -> Job | None:
    """The job; with ``lock`` nobody else changes it until the caller's transaction ends."""
    statement = sa.select(jobs).where(jobs.c.job_id == job_id)
    row = c.execute(statement.with_for_update() if lock else statement).first()
    return None if row is None else _job(row)


def walk(c: Connection, *, after: str | None = None) -> Iterator[Job]:
    """Jobs, newest first, from the one behind ``after`` on; NotFoundError where there is no such job."""
    statement = sa.select(jobs).order_by(jobs.c.job_id.desc())
    if after is not None:
        if get(c, after) is None:
            raise NotFoundError(f"no fine-tuning job {after!r}", param="after")
        statement = statement.where(jobs.c.job_id < after)
    return (_job(row) for row in c.execute(statement))


def waiting(c: Connection, statuses: Sequence[JobStatus]) -> list[Job]:
    """Jobs in one of these states that are not paused, oldest first: the queue."""
    statement = sa.select(jobs).where(jobs.c.status.in_([status.value for status in statuses]), jobs.c.paused.is_(False))
    return [_job(row) for row in c.execute(statement.order_by(jobs.c.job_id))]


def using_file(c: Connection, file_id: str) -> Job | None:
    """A job that has not ended and needs this file."""
    uses = sa.or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id)
    row = c.execute(sa.select(jobs).where(uses, jobs.c.status.in_(_OPEN)).limit(1)).first()
    return None if row is None else _job(row)


def open_ids(c: Connection) -> set[str]:
    """Jobs that have not ended."""
    return set(c.execute(sa.select(jobs.c.job_id).where(jobs.c.status.in_(_OPEN))).scalars())


def parents(c: Connection, policy: str) -> set[int]:
    """Versions that jobs start from which have not ended."""
    statement = sa.select(jobs.c.parent).where(jobs.c.policy == policy, jobs.c.status.in_(_OPEN))
    return set(c.execute(statement).scalars())


def position(c: Connection, job: Job) -> int | None:
    """How many jobs are trained before this one; None where it does not wait."""
    if job.status is not JobStatus.QUEUED or job.paused:
        return None
    ahead = sa.select(sa.func.count()).select_from(jobs)
    waits = sa.and_(jobs.c.status == JobStatus.QUEUED.value, jobs.c.job_id < job.job_id)
    is_before = sa.or_(jobs.c.status == JobStatus.RUNNING.value, waits)
    return c.execute(ahead.where(is_before, jobs.c.paused.is_(False))).scalar_one()


def update(c: Connection, job: Job, **values: Any) -> bool:
    """Change a job that is as it was read: in the same state, paused or not, and with the same owner. False where it is not."""
    owner = jobs.c.owner.is_(None) if job.owner is None else jobs.c.owner == job.owner
    same = (jobs.c.job_id == job.job_id, jobs.c.status == job.status.value, jobs.c.paused.is_(job.paused), owner)
    values = {name: _plain(value) for name, value in values.items()}
    changed = c.execute(sa.update(jobs).where(*same).values(**values)).rowcount == 1
    if changed and "status" in values and JobStatus(values["status"]).is_terminal:
        at = values.get("finished_at") or datetime.now(UTC)
        tell(c, f"fine_tuning.job.{values['status']}", job.policy, {"id": job.job_id}, at)
    return changed


def beat(c: Connection, job_id: str, owner: str, *, at: datetime, lease_expires_at: datetime, **values: Any) -> bool:
    """Record that the owner is alive; False where the job has another one, has ended or was paused: then it stops."""
    mine = (jobs.c.job_id == job_id, jobs.c.owner == owner, jobs.c.paused.is_(False), jobs.c.status.in_(_OPEN))
    values = {name: _plain(value) for name, value in values.items()}
    statement = sa.update(jobs).where(*mine).values(heartbeat_at=at, lease_expires_at=lease_expires_at, **values)
    return c.execute(statement).rowcount == 1


def say(
    c: Connection,
    job_id: str,
    message: str,
    at: datetime,
    *,
    level: Level = "info",
    kind: EventType = "message",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Append an event."""
    c.execute(
        sa.insert(job_events),
        {
            "event_id": new_wire_id("ftevent-"),
            "job_id": job_id,
            "level": level,
            "type": kind,
            "message": message,
            "data": dict(data or {}),
            "created_at": at,
        },
    )


def events(c: Connection, job_id: str, *, limit: int, after: str | None = None) -> list[JobEvent]:
    """At most ``limit`` events, newest first, from the one behind ``after`` on; NotFoundError where there is no such event."""
    statement = sa.select(job_events).where(job_events.c.job_id == job_id).order_by(job_events.c.seq.desc())
    if after is not None:
        found = sa.select(job_events.c.seq).where(job_events.c.event_id == after, job_events.c.job_id == job_id)
        seq = c.execute(found).scalar()
        if seq is None:
            raise NotFoundError(f"no event {after!r} of this job", param="after")
        statement = statement.where(job_events.c.seq < seq)
    return [
        JobEvent(row.event_id, row.job_id, row.level, row.type, row.message, row.data, row.created_at)
        for row in c.execute(statement.limit(limit))
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _job(row: Row[Any]) -> Job:
    values = {**row._mapping, "status": JobStatus(row.status), "result_files": tuple(row.result_files)}
    return Job(**values)
