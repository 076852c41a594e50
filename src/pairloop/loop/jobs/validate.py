"""The first part of a job: read its files, refuse every bad row at once, and make a dataset of the good ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import UserError
from pairloop.formats import ReadResult, read_rows
from pairloop.loop import pairs
from pairloop.loop.cycle import Loop, owning, register_base
from pairloop.loop.jobs import methods, results, uploads
from pairloop.loop.jobs.dataset import Rows, publish_rows
from pairloop.loop.jobs.ownership import beating, claim, drop, let_go
from pairloop.loop.jobs.start import lineage_config
from pairloop.loop.pairs.rows import refuse_empty
from pairloop.store import Store, datasets, files, jobs, new_id
from pairloop.store.files import StoredFile
from pairloop.store.jobs import Job, JobStatus
from pairloop.types import Group

SHOWN = 5
"""Refused rows that stand in the error's message; the file of refused rows and the event have the others."""
MOST_IN_EVENT = 1_000
PROMPTS = "prompts"
"""The family of rows that are prompts alone."""


class RowsRefused(UserError):
    """A file with bad rows; ``param`` says which of the job's files, ``problems`` are all of them."""

    def __init__(self, file: StoredFile, param: str, read: ReadResult) -> None:
        problems = [replace(problem, file=file.filename) for problem in read.problems]
        lines = [str(problem) for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"... and {len(problems) - SHOWN} more")
        bad = sum(read.refused.values())
        super().__init__(f"{bad} of {read.rows} rows were refused:\n" + "\n".join(lines))
        self.param, self.problems, self.refused = param, problems, read.refused


def validate_next(loop: Loop) -> bool:
    """Validate the oldest job that waits for it; False where none does."""
    owner = f"{loop.owner}/{new_id('validator')}"
    with owning(owner):
        job = claim(loop, owner, [JobStatus.VALIDATING])
        if job is None:
            return False
        try:
            with beating(loop, job):
                _validate(loop, job)
        except RowsRefused as error:
            _refuse(loop.store, job, error)
        except UserError as error:
            code, param = getattr(error, "code", None), getattr(error, "param", None)
            fail(
                loop.store,
                job,
                code=code or "invalid_training_file",
                message=str(error),
                param=param or "training_file",
                kind="user_error",
            )
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
        current = jobs.get(c, job.job_id)
        if current is None or current.status.is_terminal or current.owner != job.owner:
            return
        for file in left:
            files.insert(c, file)
        result_files = [*current.result_files, *(file.file_id for file in left)]
        values = {"status": JobStatus.FAILED, "error": error, "result_files": result_files, "finished_at": now}
        jobs.update(c, current, owner=None, lease_expires_at=None, **values)
        jobs.say(c, job.job_id, f"The job failed: {message}", now, level="error", data={**error, **(data or {})})

    store.write(write)


def _validate(loop: Loop, job: Job) -> None:
    config = lineage_config(loop.config, job.policy, job.base_model)
    if job.base_model is not None:
        register_base(loop.store, config)
    rows = _read(loop, config, job)
    dataset = publish_rows(loop.store, job, rows) if methods.verifier_of(job.method) is None else None
    method, now = methods.resolved(job.method, config), datetime.now(UTC)

    def queue(c: Connection) -> None:
        if dataset is not None and datasets.get(c, dataset.dataset_id) is None:
            datasets.insert(c, dataset, feedback_seq=0, cycle_id=None, pairs=[])
        current = jobs.get(c, job.job_id)
        if current is None or current.owner != job.owner or current.status is not JobStatus.VALIDATING:
            return  # cancelled meanwhile
        dataset_id = None if dataset is None else dataset.dataset_id
        jobs.update(c, current, status=JobStatus.QUEUED, dataset_id=dataset_id, method=method)
        what = f"{len(rows.train)} to train on, {len(rows.heldout)} held out" if dataset is not None else "each a prompt"
        text = f"Files validated: {rows.read} rows, {what}"
        jobs.say(c, job.job_id, text, now, data={"rows": rows.read, "counts": dict(rows.counts), "dropped": dict(rows.dropped)})
        queued = jobs.get(c, job.job_id)
        assert queued is not None, "jobs are never deleted"
        position = jobs.position(c, queued)
        where = "waits until it is resumed" if position is None else f"{position} before it"
        jobs.say(c, job.job_id, f"Fine-tuning job queued; {where}", now, data={"position": position})

    loop.store.write(queue)


def read_prompts(loop: Loop, config: Config, job: Job) -> tuple[list[Group], int]:
    """The prompts of a job whose answers are sampled and scored by a verifier, and how many rows they are."""
    read = _read_file(loop, config, job, "training_file", family=PROMPTS)
    return [labelled.group for labelled in read.groups], read.rows


def _read(loop: Loop, config: Config, job: Job) -> Rows:
    if methods.verifier_of(job.method) is not None:
        prompts, rows = read_prompts(loop, config, job)
        return Rows((), (), rows, {"prompts": len(prompts)}, {})
    training = _read_file(loop, config, job, "training_file")
    validation = None if job.validation_file is None else _read_file(loop, config, job, "validation_file")
    objective = methods.objective_of(job.method)
    compiled = pairs.compile_rows(training.groups, pairs.PairRules.of(config, split_prompts=validation is None), objective)
    refuse_empty(compiled, objective)
    heldout = compiled.heldout
    if validation is not None:
        measured = pairs.compile_rows(validation.groups, pairs.PairRules.of(config, split_prompts=False), objective)
        heldout = refuse_empty(measured, objective, param="validation_file").train
    return Rows(compiled.train, heldout, training.rows, compiled.counts, compiled.dropped)


def _read_file(loop: Loop, config: Config, job: Job, param: str, *, family: str | None = None) -> ReadResult:
    """The good rows of a file that has no other; RowsRefused names all that are bad.

    Rows for this server's own policy are also held against its template and ``train.max_length``; of another base's, what
    is too long is found by the training itself.
    """
    with loop.store.reading() as c:
        file = uploads.get(c, job.training_file if param == "training_file" else job.validation_file or "", param=param)
    read = read_rows(
        Path(file.path),
        family=family,
        max_chars=config.pairs.max_chars,
        tokens=loop.policy.tokens if job.base_model is None else None,
        max_length=config.train.max_length,
        policy=config.policy.name,
    )
    if read.problems:
        raise RowsRefused(file, param, read)
    return read


def _refuse(store: Store, job: Job, error: RowsRefused) -> None:
    """Fail a job by its rows: the first ones in the message, all of them in a file, as many as fit in the event."""
    file = results.problems_file(store, job.job_id, error.problems)
    data = {"refused": error.refused, "problems": [results.plain(one) for one in error.problems[:MOST_IN_EVENT]]}
    code = f"invalid_{error.param}"
    fail(
        store,
        job,
        code=code,
        message=f"{error} (all of them are in {file.file_id})",
        param=error.param,
        kind="user_error",
        data=data,
        left=[file],
    )
