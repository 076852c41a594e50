"""The shapes of jobs, events and checkpoints on the OpenAI wire, and how they are made from rows. Times are Unix seconds."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import Connection

from pairloop.loop import jobs
from pairloop.store import jobs as rows
from pairloop.store.jobs import Job, JobEvent, JobStatus
from pairloop.types import Version
from pairloop.web.resources import seconds


class JobError(BaseModel):
    """Why a job failed; ``kind`` says whose fault it was: ``user_error`` or ``system_error``."""

    code: str
    message: str
    param: str | None
    kind: str | None = None


class JobProgress(BaseModel):
    """What OpenAI's shape has no place for. ``queue_position``: jobs that are trained before this one."""

    starts_from: str
    step: int | None
    total_steps: int | None
    queue_position: int | None
    paused: bool
    heartbeat_at: int | None
    attempt: int


class JobResource(BaseModel):
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: str
    model: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    status: str
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    trained_tokens: int | None
    error: JobError | None
    integrations: list[Any]
    seed: int
    method: dict[str, Any]
    metadata: dict[str, str] | None
    pairloop: JobProgress


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobResource]
    has_more: bool


class EventResource(BaseModel):
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: str
    created_at: int
    level: str
    message: str
    data: dict[str, Any]
    type: str


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EventResource]
    has_more: bool


class CheckpointResource(BaseModel):
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckpointResource]
    first_id: str | None
    last_id: str | None
    has_more: bool


def job_resource(c: Connection, job: Job) -> JobResource:
    return JobResource(
        id=job.job_id,
        model=job.model,
        created_at=seconds(job.created_at),
        finished_at=None if job.finished_at is None else seconds(job.finished_at),
        estimated_finish=_estimated_finish(job),
        fine_tuned_model=job.fine_tuned_model,
        organization_id=f"org-{jobs.ORGANIZATION}",
        result_files=list(job.result_files),
        status=(JobStatus.QUEUED if job.paused and not job.status.is_terminal else job.status).value,
        training_file=job.training_file,
        validation_file=job.validation_file,
        hyperparameters=_hyperparameters(job),
        trained_tokens=job.trained_tokens,
        error=None if job.error is None else JobError(**job.error),
        integrations=[],
        seed=job.seed,
        method=dict(job.method),
        metadata=None if job.metadata is None else dict(job.metadata),
        pairloop=JobProgress(
            starts_from=f"{job.policy}@{job.parent}",
            step=job.progress.get("step"),
            total_steps=job.progress.get("of"),
            queue_position=rows.position(c, job),
            paused=job.paused,
            heartbeat_at=None if job.heartbeat_at is None else seconds(job.heartbeat_at),
            attempt=job.attempt,
        ),
    )


def event_resource(event: JobEvent) -> EventResource:
    return EventResource(
        id=event.event_id,
        created_at=seconds(event.created_at),
        level=event.level,
        message=event.message,
        data=dict(event.data),
        type=event.type,
    )


def checkpoint_resource(version: Version) -> CheckpointResource:
    assert version.model_name is not None
    assert version.job_id is not None
    assert version.step_number is not None
    return CheckpointResource(
        id=jobs.checkpoint_id(version),
        created_at=seconds(version.created_at),
        fine_tuned_model_checkpoint=version.model_name,
        fine_tuning_job_id=version.job_id,
        metrics={"step": version.step_number, **(version.metrics or {})},
        step_number=version.step_number,
    )


def _hyperparameters(job: Job) -> dict[str, Any]:
    numbers: dict[str, Any] = job.method[job.method["type"]]["hyperparameters"]
    return numbers


def _estimated_finish(job: Job) -> int | None:
    end = job.progress.get("expected_end")
    return seconds(datetime.fromisoformat(end)) if end is not None and job.status is JobStatus.RUNNING else None
