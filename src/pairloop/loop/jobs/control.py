"""What people do to jobs: create, cancel, pause, resume. Each is one transaction; the worker that has the job sees it soon."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.loop import train
from pairloop.loop.jobs import methods, uploads
from pairloop.loop.jobs.request import MAX_SEED, JobRequest
from pairloop.loop.jobs.start import find_start
from pairloop.store import Store, jobs, new_wire_id
from pairloop.store.files import Purpose
from pairloop.store.jobs import Job, JobStatus


def create(store: Store, config: Config, request: JobRequest) -> Job:
    """Write a job down; its files are validated next. NotFoundError and InvalidRequestError name the field that is wrong."""
    method, now = methods.as_asked(request, config), datetime.now(UTC)

    def write(c: Connection) -> Job:
        _check_file(c, request.training_file, "training_file")
        if request.validation_file is not None:
            _check_file(c, request.validation_file, "validation_file")
        start = find_start(c, config, request.start)
        if request.validation_file is not None and request.verifier is not None:
            raise InvalidRequestError(
                f"with {request.verifier[1]} a share of the prompts is held out and scored by it; leave validation_file out",
                param="validation_file",
            )
        if start.base_model is not None and request.verifier is not None:
            raise InvalidRequestError(
                f"a verifier scores what this server's engine samples, and that has only the base of {config.policy.name!r}",
                param=request.verifier[1],
            )
        job = Job(
            job_id=new_wire_id("ftjob-"),
            status=JobStatus.VALIDATING,
            model=request.start,
            policy=start.policy,
            parent=start.number,
            base_model=start.base_model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            method=method,
            suffix=request.suffix,
            seed=random.SystemRandom().randrange(MAX_SEED) if request.seed is None else request.seed,
            metadata=request.metadata,
            created_at=now,
        )
        jobs.insert(c, job)
        jobs.say(
            c, job.job_id, f"Created fine-tuning job: {job.job_id}", now, data={"starts_from": f"{job.policy}@{job.parent}"}
        )
        jobs.say(c, job.job_id, f"Validating training file: {job.training_file}", now)
        return job

    return store.write(write)


def cancel(store: Store, job_id: str) -> Job:
    """End a job now; InvalidRequestError where it has ended already."""
    now = datetime.now(UTC)

    def write(c: Connection, job: Job) -> None:
        jobs.update(c, job, status=JobStatus.CANCELLED, finished_at=now)
        jobs.say(c, job_id, "The job was cancelled", now, level="warn")

    job = _change(store, job_id, "cancelled", write)
    train.forget(store.artifacts, job_id)
    return job


def pause(store: Store, job_id: str) -> Job:
    """Stop a job at its next step, or keep it from beginning; it shows ``queued``. InvalidRequestError where it has ended."""
    now = datetime.now(UTC)

    def write(c: Connection, job: Job) -> None:
        if job.paused:
            raise InvalidRequestError(f"{job_id} is paused already; POST .../resume goes on with it", code="invalid_state")
        status = JobStatus.QUEUED if job.status is JobStatus.RUNNING else job.status
        jobs.update(c, job, status=status, paused=True)
        jobs.say(c, job_id, "The job was paused; it shows queued until it is resumed", now, data={"was": job.status.value})

    return _change(store, job_id, "paused", write)


def resume(store: Store, job_id: str) -> Job:
    """Put a paused job back into the queue; InvalidRequestError where it is not paused."""
    now = datetime.now(UTC)

    def write(c: Connection, job: Job) -> None:
        if not job.paused:
            raise InvalidRequestError(f"{job_id} is {job.status}, not paused; there is nothing to resume", code="invalid_state")
        jobs.update(c, job, paused=False)
        jobs.say(c, job_id, "The job was resumed", now)

    return _change(store, job_id, "resumed", write)


def get(c: Connection, job_id: str) -> Job:
    """The job; NotFoundError where there is none."""
    job = jobs.get(c, job_id)
    if job is None:
        raise NotFoundError(f"no fine-tuning job {job_id!r}", param="fine_tuning_job_id")
    return job


def _change(store: Store, job_id: str, what: str, act: Callable[[Connection, Job], None]) -> Job:
    def write(c: Connection) -> Job:
        job = get(c, job_id)
        if job.status.is_terminal:
            raise InvalidRequestError(f"{job_id} is {job.status} already; it cannot be {what}", code="invalid_state")
        act(c, job)
        return get(c, job_id)

    return store.write(write)


def _check_file(c: Connection, file_id: str, param: str) -> None:
    file = uploads.get(c, file_id, param=param)
    if file.purpose is not Purpose.FINE_TUNE:
        raise InvalidRequestError(
            f"{file_id} has the purpose {file.purpose.value!r}; upload rows with purpose={Purpose.FINE_TUNE.value!r}",
            param=param,
        )
