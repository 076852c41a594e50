"""The first part of a job: read its files, refuse every bad row at once, and make a dataset of the good ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import Config
from pairloop.errors import UnavailableError, UserError
from pairloop.loop.cycle import Loop, owning, register_base
from pairloop.loop.jobs import dataset, methods, results, uploads
from pairloop.loop.jobs.ownership import beating, claim, drop, let_go
from pairloop.loop.jobs.reading import Found, Order, Source, read
from pairloop.loop.jobs.start import lineage_config
from pairloop.store import Store, files, jobs, new_id
from pairloop.store.files import StoredFile
from pairloop.store.jobs import Job, JobStatus
from pairloop.types import Dataset

SHOWN = 5
"""Refused rows that stand in the error's message; the file of refused rows and the event have the others."""
MOST_IN_EVENT = 1_000


def _never() -> bool:
    return False


def validate_next(loop: Loop, should_stop: Callable[[], bool] = _never) -> bool:
    """Validate the oldest job that waits for it; False where none does."""
    owner = f"{loop.owner}/{new_id('validator')}"
    with owning(owner):
        job = claim(loop, owner, [JobStatus.VALIDATING])
        if job is None:
            return False
        try:
            with beating(loop, job):
                _validate(loop, job, should_stop)
        except UserError as error:
            code, param = getattr(error, "code", None), getattr(error, "param", None)
            fail(loop.store, job, code=code or "invalid_job", message=str(error), param=param, kind="user_error")
        except UnavailableError:  # says nothing about the job: it goes on when the store is back
            with suppress(UnavailableError):
                loop.store.write(lambda c: let_go(c, job.job_id, owner))
            raise
        except Exception as error:  # the supervisor: whatever it was, the job is tried again a few times, and says it
            trouble = f"{type(error).__name__}: {error}"
            loop.store.write(lambda c: drop(c, job.job_id, owner, trouble))
            raise
        loop.store.write(lambda c: let_go(c, job.job_id, owner))
    return True


def fail(
    store: Store,
    job: Job,
    *,
    code: str,
    message: str,
    param: str | None,
    kind: str,
    data: Mapping[str, Any] | None = None,
    left: Sequence[StoredFile] = (),
) -> None:
    """End a job as failed, with the files that it leaves; nothing where it was cancelled meanwhile."""
    error, now = {"code": code, "message": message, "param": param, "kind": kind}, datetime.now(UTC)

    def write(c: Connection) -> None:
        current = jobs.get(c, job.job_id, lock=True)
        if current is None or current.status.is_terminal or current.owner != job.owner:
            return
        for file in left:
            files.insert(c, file)
        result_files = [*current.result_files, *(file.file_id for file in left)]
        values = {"status": JobStatus.FAILED, "error": error, "result_files": result_files, "finished_at": now}
        jobs.update(c, current, owner=None, lease_expires_at=None, **values)
        jobs.say(c, job.job_id, f"The job failed: {message}", now, level="error", data={**error, **(data or {})})

    store.write(write)


def source_of(c: Connection, job: Job, param: str) -> Source:
    """A file of the job by its field; NotFoundError where it is gone."""
    file_id = job.training_file if param == "training_file" else job.validation_file or ""
    file = uploads.get(c, file_id, param=param)
    return Source(file.path, file.filename, param)


def here(store: Store, source: Source) -> Source:
    """The source with its content on this machine, for as long as it is read; after the transaction that named it."""
    return replace(source, path=str(store.artifacts.hold(source.path)))


def _validate(loop: Loop, job: Job, should_stop: Callable[[], bool]) -> None:
    config = lineage_config(loop.config, job.policy, job.base_model)
    if job.base_model is not None:
        register_base(loop.store, config)
    by_verifier = methods.verifier_of(job.method) is not None
    with loop.store.reading() as c:
        training = source_of(c, job, "training_file")
        validation = source_of(c, job, "validation_file") if job.validation_file is not None else None
    training = here(loop.store, training)
    validation = None if validation is None else here(loop.store, validation)
    with loop.store.artifacts.stage() as folder:
        objective = None if by_verifier else methods.objective_of(job.method)
        found = read(Order(config, objective, training, validation, folder), should_stop)
        if found is None:
            return  # this process stops; another one reads the files again
        if found.problems or found.message is not None:
            _refuse(loop.store, job, found)
            return
        counts, dropped = found.counts or {}, found.dropped or {}
        made = None
        if not by_verifier:
            made = dataset.publish(
                loop.store, job, folder, train=found.train, heldout=found.heldout, counts=counts, dropped=dropped
            )
            faults.reach("job.dataset_published")
    _queue(loop.store, job, config, found, made)


def _queue(store: Store, job: Job, config: Config, found: Found, made: Dataset | None) -> None:
    method, now = methods.resolved(job.method, config), datetime.now(UTC)
    what = "each a prompt" if made is None else f"{found.train} to train on, {found.heldout} held out"
    data = {"rows": found.rows, "counts": dict(found.counts or {}), "dropped": dict(found.dropped or {})}

    def write(c: Connection) -> None:
        current = jobs.get(c, job.job_id, lock=True)
        if current is None or current.owner != job.owner or current.status is not JobStatus.VALIDATING:
            return  # cancelled or taken over meanwhile
        if made is not None:
            dataset.record(c, made)
        dataset_id = None if made is None else made.dataset_id
        jobs.update(c, current, status=JobStatus.QUEUED, dataset_id=dataset_id, method=method)
        jobs.say(c, job.job_id, f"Files validated: {found.rows} rows, {what}", now, data=data)
        queued = jobs.get(c, job.job_id)
        assert queued is not None, "jobs are never deleted"
        position = jobs.position(c, queued)
        where = "waits until it is resumed" if position is None else f"{position} before it"
        jobs.say(c, job.job_id, f"Fine-tuning job queued; {where}", now, data={"position": position})

    store.write(write)


def _refuse(store: Store, job: Job, found: Found) -> None:
    """Fail a job by its rows: the first ones in the message, all of them in a file, as many as fit in the event."""
    if found.message is not None:
        fail(store, job, code=str(found.code), message=found.message, param=found.param, kind="user_error")
        return
    lines = [str(problem) for problem in found.problems[:SHOWN]]
    if len(found.problems) > SHOWN:
        lines.append(f"... and {len(found.problems) - SHOWN} more")
    file = results.problems_file(store, job.job_id, found.problems)
    refused = dict(found.refused or {})
    text = f"{sum(refused.values())} of {found.rows} rows were refused (all of them are in {file.file_id}):\n" + "\n".join(
        lines
    )
    data = {"refused": refused, "problems": [results.plain(one) for one in found.problems[:MOST_IN_EVENT]]}
    fail(store, job, code=f"invalid_{found.param}", message=text, param=found.param, kind="user_error", data=data, left=[file])
