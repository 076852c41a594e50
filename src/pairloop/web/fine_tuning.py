"""The fine-tuning jobs of the OpenAI wire: created, watched, paused, cancelled; their events and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.loop import jobs
from pairloop.store import jobs as rows
from pairloop.store import versions
from pairloop.store.jobs import Job
from pairloop.types import Version
from pairloop.web.context import Context, Here
from pairloop.web.job_resources import (
    CheckpointList,
    EventList,
    JobList,
    JobResource,
    checkpoint_resource,
    event_resource,
    job_resource,
)
from pairloop.web.paging import After

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

Limit = Annotated[int, Query(ge=1, le=100)]
JobId = Annotated[str, Path(max_length=128)]
_METADATA = re.compile(r"metadata\[(.{1,64})\]")


@router.post("", summary="Create a job: validate its files, then train when its turn comes")
def create(body: jobs.JobRequest, context: Here) -> JobResource:
    job = jobs.create(context.store, context.config, body)
    context.notify()
    with context.store.reading() as c:
        return job_resource(c, job)


@router.get("", summary="Jobs, newest first; metadata[key]=value keeps those that have it")
def list_jobs(request: Request, context: Here, limit: Limit = 20, after: After = None) -> JobList:
    wanted = _metadata_filter(request)
    with context.store.reading() as c:
        matching = (job for job in rows.walk(c, after=after) if _has(job, wanted))
        found = list(islice(matching, limit + 1))
        return JobList(data=[job_resource(c, job) for job in found[:limit]], has_more=len(found) > limit)


@router.get("/{fine_tuning_job_id}", summary="One job")
def get_job(fine_tuning_job_id: JobId, context: Here) -> JobResource:
    with context.store.reading() as c:
        return job_resource(c, jobs.get(c, fine_tuning_job_id))


@router.post("/{fine_tuning_job_id}/cancel", summary="End a job now")
def cancel(fine_tuning_job_id: JobId, context: Here) -> JobResource:
    return _changed(context, jobs.cancel(context.store, fine_tuning_job_id))


@router.post("/{fine_tuning_job_id}/pause", summary="Stop a job at its next step; it shows queued")
def pause(fine_tuning_job_id: JobId, context: Here) -> JobResource:
    return _changed(context, jobs.pause(context.store, fine_tuning_job_id))


@router.post("/{fine_tuning_job_id}/resume", summary="Put a paused job back into the queue; any worker goes on where it was")
def resume(fine_tuning_job_id: JobId, context: Here) -> JobResource:
    return _changed(context, jobs.resume(context.store, fine_tuning_job_id))


@router.get("/{fine_tuning_job_id}/events", summary="What happened to a job, newest first")
def events(fine_tuning_job_id: JobId, context: Here, limit: Limit = 20, after: After = None) -> EventList:
    with context.store.reading() as c:
        job = jobs.get(c, fine_tuning_job_id)
        found = rows.events(c, job.job_id, limit=limit + 1, after=after)
    return EventList(data=[event_resource(event) for event in found[:limit]], has_more=len(found) > limit)


@router.get("/{fine_tuning_job_id}/checkpoints", summary="A job's checkpoints, newest first; each is a valid model of chat")
def checkpoints(fine_tuning_job_id: JobId, context: Here, limit: Limit = 10, after: After = None) -> CheckpointList:
    with context.store.reading() as c:
        job = jobs.get(c, fine_tuning_job_id)
        made = [version for version in versions.of_job(c, job.job_id) if version.step_number is not None]
        found = _after(made[::-1], after)
        shown = [checkpoint_resource(version) for version in found[:limit]]
    ends = (shown[0].id, shown[-1].id) if shown else (None, None)
    return CheckpointList(data=shown, first_id=ends[0], last_id=ends[1], has_more=len(found) > limit)


def _changed(context: Context, job: Job) -> JobResource:
    context.notify()
    with context.store.reading() as c:
        return job_resource(c, job)


def _after(found: list[Version], after: str | None) -> list[Version]:
    if after is None:
        return found
    for place, version in enumerate(found, start=1):
        if jobs.checkpoint_id(version) == after:
            return found[place:]
    raise NotFoundError(f"no checkpoint {after!r} of this job", param="after")


def _metadata_filter(request: Request) -> Mapping[str, str] | None:
    """What ``metadata[key]=value`` asks for; None for ``metadata=null``, the jobs that have none."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        match = _METADATA.fullmatch(name)
        if match is not None:
            wanted[match[1]] = value
        elif name == "metadata" and value == "null":
            return None
        elif name not in ("limit", "after"):
            raise InvalidRequestError(f"Unsupported parameter: '{name[:64]}' is not supported here.", param=name[:64])
    return wanted


def _has(job: Job, wanted: Mapping[str, str] | None) -> bool:
    known: Mapping[str, Any] = job.metadata or {}
    if wanted is None:
        return not known
    return all(known.get(key) == value for key, value in wanted.items())
