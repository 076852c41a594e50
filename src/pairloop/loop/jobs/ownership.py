"""Who has a job: the worker that took it, as long as it says now and then that it is alive."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import duration_s
from pairloop.errors import StoreError
from pairloop.loop import train
from pairloop.loop.background import repeating
from pairloop.loop.cycle import Loop, is_gone
from pairloop.store import jobs
from pairloop.store.jobs import Job, JobStatus

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Workers in a row that end without getting a job further, before it is given up."""


def claim(loop: Loop, owner: str, statuses: Sequence[JobStatus]) -> Job | None:
    """Take the oldest job in one of these states that nobody has, or whose worker died or has been silent for a lease."""
    lease, given_up = timedelta(seconds=duration_s(loop.config.schedule.lease)), list[Job]()

    def take(c: Connection) -> Job | None:
        now = loop.store.clock(c)
        given_up.clear()  # by a transaction that is done again
        for job in jobs.waiting(c, statuses):
            if job.owner is not None and not is_silent(job, now):
                if job.lease_expires_at is not None and job.lease_expires_at > now + lease:  # the clock jumped back
                    jobs.update(c, job, lease_expires_at=now + lease)
                continue
            if job.owner is not None:
                jobs.say(c, job.job_id, "Its worker is gone; another one goes on", now, level="warn", data=_where(job))
            attempt = 1 if _step(job) > job.progress.get("claimed_step", -1) else job.attempt + 1
            if attempt > MAX_ATTEMPTS:
                _give_up(c, job, now)
                given_up.append(job)
                continue
            known = {**job.progress, "claimed_step": _step(job)}
            values = {"owner": owner, "lease_expires_at": now + lease, "heartbeat_at": now, "attempt": attempt}
            if jobs.update(c, job, progress=known, **values):  # another process's claim may have come in between
                return jobs.get(c, job.job_id)
        return None

    job = loop.store.write(take)
    for one in given_up:
        train.forget(loop.store.artifacts, one.job_id)
    if job is not None:
        faults.reach("job.claimed")
    return job


@contextmanager
def beating(loop: Loop, job: Job) -> Iterator[None]:
    """A thread that says now and then that the job's owner is alive, for work that has no step at which to say so itself."""
    lease, owner = timedelta(seconds=duration_s(loop.config.schedule.lease)), job.owner
    assert owner is not None, "somebody has it"

    def say_so(c: Connection) -> bool:
        now = loop.store.clock(c)
        return jobs.beat(c, job.job_id, owner, at=now, lease_expires_at=now + lease)

    def beat() -> None:
        try:
            loop.store.write(say_so)
        except StoreError as error:
            logger.warning("%s: the heartbeat could not be written: %s", job.job_id, error)

    with repeating(beat, every_s=lease.total_seconds() / 3, name="job-heartbeat"):
        yield


def let_go(c: Connection, job_id: str, owner: str) -> None:
    """Give a job back on purpose: the next worker goes on with it, and that counts as no failed attempt."""
    job = jobs.get(c, job_id, lock=True)
    if job is not None and job.owner == owner:
        _free(c, job, attempt=max(0, job.attempt - 1))


def drop(c: Connection, job_id: str, owner: str, trouble: str) -> None:
    """Give a job back because of ``trouble``: the next worker tries again, as long as attempts are left."""
    job = jobs.get(c, job_id, lock=True)
    if job is not None and job.owner == owner:
        _free(c, job, progress={**job.progress, "trouble": trouble})
        if not job.status.is_terminal:
            jobs.say(c, job_id, f"Attempt {job.attempt} of {MAX_ATTEMPTS} failed: {trouble}", datetime.now(UTC), level="warn")


def _free(c: Connection, job: Job, **values: Any) -> None:
    if job.status is JobStatus.RUNNING:
        values["status"] = JobStatus.QUEUED
    jobs.update(c, job, owner=None, lease_expires_at=None, **values)


def is_silent(job: Job, now: datetime) -> bool:
    """True where the job's worker has not said for a lease that it is alive, or is known to be gone."""
    assert job.owner is not None, "somebody has it"
    return job.lease_expires_at is None or job.lease_expires_at <= now or is_gone(job.owner)


def _give_up(c: Connection, job: Job, now: datetime) -> None:
    trouble = job.progress.get("trouble")
    message = f"{MAX_ATTEMPTS} workers in a row ended without getting this job further" + (
        f"; last: {trouble}" if trouble else ""
    )
    error = {"code": "worker_died", "message": message, "param": None, "kind": "system_error"}
    jobs.update(c, job, status=JobStatus.FAILED, error=error, owner=None, lease_expires_at=None, finished_at=now)
    jobs.say(c, job.job_id, message, now, level="error", data=error)


def _step(job: Job) -> int:
    return int(job.progress.get("step", 0))


def _where(job: Job) -> Mapping[str, Any]:
    return {"step": _step(job), "heartbeat_at": None if job.heartbeat_at is None else job.heartbeat_at.isoformat()}
