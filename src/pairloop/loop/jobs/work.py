"""The second part of a job: train it, tell how far it is, and end it with a model, or with the reason why there is none."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from pairloop.config import duration_s
from pairloop.errors import ConflictError, NotFoundError, StoreError, SystemFailure, UserError
from pairloop.loop import train
from pairloop.loop.cycle import Loop, owning, training
from pairloop.loop.jobs import methods, naming, results
from pairloop.loop.jobs.ownership import claim, let_go
from pairloop.loop.jobs.progress import Progress
from pairloop.loop.jobs.start import lineage_config
from pairloop.loop.jobs.validate import fail
from pairloop.loop.train import TrainRecord
from pairloop.store import datasets, files, jobs, new_id, runs, versions
from pairloop.store.files import StoredFile
from pairloop.store.jobs import Job, JobStatus
from pairloop.types import Dataset, RunStatus, Version

logger = logging.getLogger(__name__)

BEAT_S = 1.0
TRAINABLE = (JobStatus.QUEUED, JobStatus.RUNNING)


def train_next(loop: Loop, should_stop: Callable[[], bool]) -> bool:
    """Train the oldest job of the queue once this machine is free for it; False where there is none."""
    owner = f"{loop.owner}/{new_id('trainer')}"
    with loop.store.reading() as c:
        if not jobs.waiting(c, TRAINABLE):
            return False
    with owning(owner), training(loop, should_stop) as is_our_turn:
        job = claim(loop, owner, TRAINABLE) if is_our_turn else None
        if job is None:
            return False
        try:
            _Work(loop, job, should_stop).run()
        except ConflictError as error:
            logger.warning("%s: %s", job.job_id, error)  # another worker has it: nothing of this was written
        finally:
            loop.store.write(lambda c: let_go(c, job.job_id, owner))
    return True


class _Work:
    """One worker's turn at one job, which it owns."""

    def __init__(self, loop: Loop, job: Job, should_stop: Callable[[], bool]) -> None:
        assert job.owner is not None, "it was claimed"
        self._loop, self._store, self._job, self._owner = loop, loop.store, job, job.owner
        self._config = lineage_config(loop.config, job.policy, job.base_model)
        self._lease_s = duration_s(loop.config.schedule.lease)
        self._should_stop = should_stop
        self._progress = Progress(job.progress)
        self._beat_at = datetime.min.replace(tzinfo=UTC)
        self._ours = True

    def run(self) -> None:
        """Train to the end, or until the job is paused, cancelled, taken over, or this process stops."""
        try:
            self._begin()
            if self._ours:
                self._end(self._train())
        except UserError as error:
            if isinstance(error, ConflictError):
                raise
            self._fail("invalid_settings", str(error), None, "user_error")
        except (SystemFailure, OSError) as error:
            trouble = {**self._progress.known, "trouble": str(error)}
            self._store.write(lambda c: self._update(c, owner=None, lease_expires_at=None, progress=trouble))
            raise

    # -- training -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        step, now = self._progress.known.get("step", 0), datetime.now(UTC)
        if self._beat() and self._job.run_id is None and step == 0:
            self._store.write(lambda c: jobs.say(c, self._job.job_id, "Fine-tuning job started", now))
        elif self._ours:
            self._store.write(lambda c: jobs.say(c, self._job.job_id, f"Fine-tuning goes on; it had reached step {step}", now))

    def _train(self) -> TrainRecord:
        dataset, parent = self._inputs()
        return train.run(
            self._store,
            self._config,
            dataset=dataset,
            parent=parent,
            job_id=self._job.job_id,
            train=methods.train_section(self._job, self._config),
            owner=self._owner,
            on_progress=self._progress.hear,
            should_stop=self._stops,
        )

    def _inputs(self) -> tuple[Dataset, Version]:
        job = self._job
        with self._store.reading() as c:
            dataset = datasets.get(c, job.dataset_id or "")
            parent = versions.get(c, job.policy, job.parent)
        if dataset is None or parent is None:
            raise NotFoundError(f"{job.job_id}: its dataset or {job.policy}@{job.parent} is gone; run `pairloop doctor`")
        return dataset, parent

    def _stops(self) -> bool:
        """Asked a few times a second while it trains."""
        if self._should_stop():
            return True
        if self._ours and (datetime.now(UTC) - self._beat_at).total_seconds() >= BEAT_S:
            try:
                self._beat()
            except StoreError as error:  # another process holds the database; the lease outlasts that
                logger.warning("%s: the heartbeat could not be written: %s", self._job.job_id, error)
        return not self._ours

    def _beat(self) -> bool:
        """Say that it lives and how far it is; False where the job is no longer to be worked on."""
        self._beat_at = now = datetime.now(UTC)
        until, events = now + timedelta(seconds=self._lease_s), self._progress.take_events()

        def write(c: Connection) -> bool:
            known = {"status": JobStatus.RUNNING, "progress": self._progress.known}
            ours = jobs.beat(c, self._job.job_id, self._owner, at=now, lease_expires_at=until, **known)
            for message, data in events if ours else ():
                jobs.say(c, self._job.job_id, message, now, kind="metrics", data=data)
            return ours

        self._ours = self._store.write(write)
        return self._ours

    # -- how it ends ----------------------------------------------------------------------------------------------------

    def _end(self, record: TrainRecord) -> None:
        if record.status is not RunStatus.RUNNING:
            self._beat()
        match record.status:
            case RunStatus.SUCCEEDED:
                assert record.version is not None, "a run that succeeded made a version"
                self._succeed(record, record.version)
            case RunStatus.NOTHING_TO_TRAIN:
                text = str(record.result.get("stop_message") or "too few usable rows to train on")
                self._fail("too_few_rows", f"{text} (train.min_pairs)", "training_file", "user_error")
            case RunStatus.USER_ERROR | RunStatus.SYSTEM_ERROR:
                error = record.result.get("error") or {}
                code, text = error.get("code", "crash"), error.get("message", "the training process left no reason")
                param = "training_file" if code == "bad_rows" else None
                self._fail(str(code), str(text), param, str(record.status), left=[self._metrics()])
            case _:
                self._stopped(record.run_id)

    def _succeed(self, record: TrainRecord, version: Version) -> None:
        job, now, name = self._job, datetime.now(UTC), naming.model_name(self._job)
        metrics, result = self._metrics(), record.result

        def write(c: Connection) -> None:
            versions.give_name(c, version, job_id=job.job_id, model_name=name)
            files.insert(c, metrics)
            self._update(
                c,
                status=JobStatus.SUCCEEDED,
                fine_tuned_model=name,
                trained_tokens=result.get("trained_tokens"),
                run_id=record.run_id,
                result_files=[metrics.file_id],
                owner=None,
                lease_expires_at=None,
                finished_at=now,
            )
            text = f"New fine-tuned model created: {name}"
            jobs.say(c, job.job_id, text, now, data={"version": version.name, "why_it_stopped": result.get("stop_message")})
            jobs.say(c, job.job_id, "The job has successfully completed", now)

        self._store.write(write)

    def _fail(self, code: str, message: str, param: str | None, kind: str, left: tuple[StoredFile, ...] | list[StoredFile] = ()) -> None:
        fail(self._store, self._job, code=code, message=message, param=param, kind=kind, left=left)

    def _stopped(self, run_id: str) -> None:
        """It was paused or cancelled, another worker took it, or this process stops: say which, and leave it in order."""
        job_id, now, step = self._job.job_id, datetime.now(UTC), self._progress.known.get("step", 0)
        with self._store.reading() as c:
            current = jobs.get(c, job_id)
        if current is None or current.owner != self._owner:
            return
        if current.status is JobStatus.CANCELLED:
            discard(self._loop, current)
            return
        text = f"Paused at step {step}" if current.paused else f"Interrupted at step {step}: its worker stops; it goes on later"
        self._store.write(lambda c: jobs.say(c, job_id, text, now, data={"step": step, "run_id": run_id}))

    def _metrics(self) -> StoredFile:
        with self._store.reading() as c:
            run = runs.for_job(c, self._job.job_id)
        rows: list[Mapping[str, Any]] = [] if run is None else train.metrics_of(self._config, run)
        return results.metrics_file(self._store, self._job.job_id, rows)

    def _update(self, c: Connection, **values: Any) -> None:
        """Change the job in the caller's transaction; ConflictError, which undoes all of it, where it is no longer ours."""
        current = jobs.get(c, self._job.job_id)
        if current is None or current.owner != self._owner or current.status is not JobStatus.RUNNING:
            raise ConflictError(f"{self._job.job_id} was cancelled, paused or taken over meanwhile")
        jobs.update(c, current, progress={**self._progress.known, **values.pop("progress", {})}, **values)


def discard(loop: Loop, job: Job) -> None:
    """End the run of a cancelled job, and remove its files."""
    now = datetime.now(UTC)
    with loop.store.reading() as c:
        run = runs.for_job(c, job.job_id)
    if run is not None and run.status is RunStatus.RUNNING:
        loop.store.write(lambda c: runs.end(c, run.run_id, RunStatus.CANCELLED, {}, "its job was cancelled", now))
        shutil.rmtree(train.folder_of(loop.config, run), ignore_errors=True)
