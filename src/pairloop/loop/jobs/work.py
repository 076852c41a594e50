"""The second part of a job: train it, tell how far it is, and end it with a model, or with the reason why there is none."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import TrainSection, duration_s
from pairloop.errors import ConflictError, NotFoundError, StoreError, UnavailableError, UserError
from pairloop.formats import snapshot
from pairloop.learner.child import Row, read_rows
from pairloop.learner.job import TrainResult, TrainStatus
from pairloop.loop import train
from pairloop.loop.cycle import Loop, owning, training
from pairloop.loop.jobs import methods, results
from pairloop.loop.jobs.dataset import publish as publish_dataset
from pairloop.loop.jobs.dataset import record
from pairloop.loop.jobs.models import checkpoint_name, model_name, publish
from pairloop.loop.jobs.ownership import beating, claim, drop, let_go
from pairloop.loop.jobs.progress import Progress
from pairloop.loop.jobs.reading import prompts_of
from pairloop.loop.jobs.rollouts import roll_out
from pairloop.loop.jobs.start import lineage_config
from pairloop.loop.jobs.validate import fail, here, source_of
from pairloop.store import datasets, files, jobs, new_id, versions
from pairloop.store.files import StoredFile
from pairloop.store.jobs import Job, JobStatus
from pairloop.telemetry import logs
from pairloop.track import RunInfo, reporting, training_info
from pairloop.types import Dataset, Version

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
            with logs.about(policy=job.policy, job=job.job_id):
                _Work(loop, job, should_stop).run()
        except ConflictError as error:
            logger.warning("%s: %s", job.job_id, error)  # another worker has it: nothing of this was written
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


def folder_of(loop: Loop, job: Job) -> Path:
    """Where a job's training lies, for all attempts on this machine."""
    return (loop.config.runs_dir / job.job_id).resolve()


def discard(loop: Loop, job: Job) -> None:
    """Remove what an ended job's training has left, here and elsewhere: its models are versions, its metrics a file."""
    shutil.rmtree(folder_of(loop, job), ignore_errors=True)
    train.forget(loop.store.artifacts, job.job_id)


class _Work:
    """One worker's turn at one job, which it owns."""

    def __init__(self, loop: Loop, job: Job, should_stop: Callable[[], bool]) -> None:
        assert job.owner is not None, "it was claimed"
        self._loop, self._store, self._job, self._owner = loop, loop.store, job, job.owner
        self._config = lineage_config(loop.config, job.policy, job.base_model)
        self._folder = folder_of(loop, job)
        self._lease_s = duration_s(loop.config.schedule.lease)
        self._should_stop = should_stop
        self._progress = Progress(job.progress)
        self._beat_at_s = float("-inf")
        self._ours = True
        self._kept_step = 0

    def run(self) -> None:
        """Train to the end, or until the job is paused, cancelled, taken over, or this process stops."""
        try:
            with beating(self._loop, self._job):  # fetching the parent, say, or an upload may take longer than a lease
                if self._begin():
                    self._end(self._train())
                else:
                    self._stopped()
        except ConflictError:
            raise
        except UserError as error:
            self._fail(getattr(error, "code", None) or "bad_settings", str(error), getattr(error, "param", None), "user_error")

    # -- training -------------------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        step, now = self._progress.known.get("step"), datetime.now(UTC)
        text = "Fine-tuning job started" if step is None else f"Fine-tuning goes on; it had reached step {step}"
        if self._beat():
            self._store.write(lambda c: self._say(c, text, now, {"step": step}))
        return self._ours

    def _train(self) -> TrainResult:
        dataset, parent = self._inputs()
        dataset = dataset or self._roll_out(parent)
        if dataset is None:
            return TrainResult(TrainStatus.PAUSED)
        hold, section = self._store.artifacts.hold, methods.train_section(self._job, self._config)
        with reporting(self._config, self._told(section, dataset, parent)) as report:

            def hear(row: Row) -> None:
                self._progress.hear(row)
                report.row(row)

            result = train.run_in(
                self._folder,
                self._config,
                start=train.Start.of(self._config.policy.model, parent, hold),
                data=hold(dataset.path),
                train=section,
                run_id=self._job.job_id,
                keep_epochs=True,
                on_progress=hear,
                on_checkpoint=self._keep_checkpoint,
                should_stop=self._stops,
                shared=train.Shared(self._store.artifacts, self._has_ended, self._is_kept),
            )
            made = model_name(self._job) if result.status is TrainStatus.SUCCEEDED else None
            report.trained(result.as_dict(), status=str(result.status), version=made)
        return result

    def _told(self, section: TrainSection, dataset: Dataset, parent: Version) -> RunInfo:
        """The job as the configured trackers know it."""
        job, config = self._job, self._config.model_copy(update={"train": section})
        return training_info(
            config,
            key=job.job_id,
            name=model_name(job),
            parent=parent.name,
            dataset=dataset.dataset_id,
            rows=dataset.n_train,
        )

    def _inputs(self) -> tuple[Dataset | None, Version]:
        """The dataset, unless it has yet to be sampled, and the version to start from."""
        job = self._job
        with self._store.reading() as c:
            dataset = None if job.dataset_id is None else datasets.get(c, job.dataset_id)
            parent = versions.get(c, job.policy, job.parent)
        if parent is None or (dataset is None and job.dataset_id is not None):
            raise NotFoundError(f"{job.job_id}: its dataset or {job.policy}@{job.parent} is gone; run `pairloop doctor`")
        return dataset, parent

    def _roll_out(self, parent: Version) -> Dataset | None:
        """The dataset of a job with a verifier: sampled and scored now; None where the job is to stop meanwhile."""
        with self._store.reading() as c:
            source = source_of(c, self._job, "training_file")
        prompts = prompts_of(self._config, here(self._store, source))

        def tell(done: int) -> bool:
            self._progress.known["prompts"] = done
            return not self._stops()

        rows = roll_out(self._loop, self._config, self._job, parent, prompts, tell)
        if rows is None:
            return None
        now = datetime.now(UTC)
        with self._store.artifacts.stage() as folder:
            snapshot.write_folder(folder, rows.train, rows.heldout)
            sizes = {"train": len(rows.train), "heldout": len(rows.heldout)}
            dataset = publish_dataset(self._store, self._job, folder, **sizes, counts=rows.counts, dropped=rows.dropped)

        def write(c: Connection) -> None:
            record(c, dataset)
            self._update(c, dataset_id=dataset.dataset_id)
            text = (
                f"Sampled and scored {len(prompts)} prompts: {len(rows.train)} groups to train on, {len(rows.heldout)} held out"
            )
            data = {"counts": dict(rows.counts), "dropped": dict(rows.dropped)}
            jobs.say(c, self._job.job_id, text, now, data=data)

        self._store.write(write)
        self._job = replace(self._job, dataset_id=dataset.dataset_id)
        return dataset

    def _stops(self) -> bool:
        """Asked a few times a second while it trains. What is cancelled is paused as well, and then removed."""
        if self._should_stop():
            return True
        if self._ours and time.monotonic() - self._beat_at_s >= BEAT_S:  # not by the wall clock, which may jump
            try:
                self._beat()
            except StoreError as error:  # another process holds the database; the lease outlasts that
                logger.warning("%s: the heartbeat could not be written: %s", self._job.job_id, error)
        return not self._ours

    def _beat(self) -> bool:
        """Say that it lives and how far it is; False where the job is no longer to be worked on."""
        self._beat_at_s, events = time.monotonic(), self._progress.take_events()

        def write(c: Connection) -> bool:
            now = self._store.clock(c)
            until = now + timedelta(seconds=self._lease_s)
            known = {"status": JobStatus.RUNNING, "progress": self._progress.known}
            ours = jobs.beat(c, self._job.job_id, self._owner, at=now, lease_expires_at=until, **known)
            for message, data in events if ours else ():
                jobs.say(c, self._job.job_id, message, now, kind="metrics", data=data)
            return ours

        try:
            self._ours = self._store.write(write)
        except StoreError:
            self._progress.tell_again(events)
            raise
        return self._ours

    def _keep_checkpoint(self, step: int, folder: Path, metrics: Row) -> None:
        """The model after an epoch becomes a version of its own; told again after an interruption, it is there already."""
        job, name = self._job, checkpoint_name(self._job, step)
        with self._store.reading() as c:
            known = versions.by_model_name(c, name)
        if known is not None:
            self._kept_step = step
        if known is not None or not self._beat():
            return
        made = publish(self._store, self._config, job, folder, name=name, step=step, metrics=metrics)
        faults.reach("job.checkpoint_published")

        def write(c: Connection) -> None:
            self._check(c)
            version = made(c)
            text = f"Checkpoint created at step {step}: {name}"
            jobs.say(c, job.job_id, text, datetime.now(UTC), data={"version": version.name, "step": step, **metrics})

        try:
            self._store.write(write)
            self._kept_step = step
        except ConflictError as error:
            self._ours = False
            logger.info("%s: no checkpoint at step %s: %s", job.job_id, step, error)

    def _is_kept(self, step: int) -> bool:
        """Whether the model after the epoch that ended with ``step`` is a version: its folder is on this machine alone."""
        return step <= self._kept_step

    # -- how it ends ----------------------------------------------------------------------------------------------------

    def _end(self, result: TrainResult) -> None:
        if result.status is TrainStatus.PAUSED or not self._beat():
            self._stopped()
        elif result.status is TrainStatus.SUCCEEDED:
            self._succeed(result)
        elif result.error is None:
            text = (
                f"{result.stop_message or 'too few usable rows to train on'} (train.min_pairs = {self._config.train.min_pairs})"
            )
            self._fail("too_few_rows", text, "training_file", "user_error")
        else:
            error = result.error
            param = "training_file" if error.code in ("bad_rows", "unfit_rows") else None
            self._fail(error.code, error.message, param, error.kind, left=[self._metrics()])

    def _succeed(self, result: TrainResult) -> None:
        job, now, name = self._job, datetime.now(UTC), model_name(self._job)
        made = publish(self._store, self._config, job, self._folder / "out", name=name, result=result)
        metrics = self._metrics()
        faults.reach("job.published")

        def write(c: Connection) -> None:
            self._check(c)
            version = made(c)
            files.insert(c, metrics)
            self._update(
                c,
                status=JobStatus.SUCCEEDED,
                fine_tuned_model=name,
                trained_tokens=result.trained_tokens,
                result_files=[metrics.file_id],
                owner=None,
                lease_expires_at=None,
                finished_at=now,
            )
            data = {"version": version.name, "why_it_stopped": result.stop_message, "warnings": list(result.warnings)}
            jobs.say(c, job.job_id, f"New fine-tuned model created: {name}", now, data=data)
            jobs.say(c, job.job_id, "The job has successfully completed", now)

        self._store.write(write)
        faults.reach("job.ended")
        discard(self._loop, job)

    def _fail(self, code: str, message: str, param: str | None, kind: str, left: Sequence[StoredFile] = ()) -> None:
        fail(self._store, self._job, code=code, message=message, param=param, kind=kind, left=left)
        if self._has_ended():  # and was not taken over
            train.forget(self._store.artifacts, self._job.job_id)

    def _has_ended(self) -> bool:
        with self._store.reading() as c:
            current = jobs.get(c, self._job.job_id)
        return current is None or current.status.is_terminal

    def _stopped(self) -> None:
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
        self._store.write(lambda c: self._say(c, text, now, {"step": step}))

    def _say(self, c: Connection, text: str, now: datetime, data: Mapping[str, Any]) -> None:
        """Append an event, as long as the job is ours."""
        current = jobs.get(c, self._job.job_id, lock=True)
        if current is not None and current.owner == self._owner:
            jobs.say(c, self._job.job_id, text, now, data=data)

    def _metrics(self) -> StoredFile:
        return results.metrics_file(self._store, self._job.job_id, read_rows(self._folder / "metrics.jsonl")[0])

    def _check(self, c: Connection) -> Job:
        """ConflictError, which undoes the caller's transaction, where the job is no longer ours to change."""
        current = jobs.get(c, self._job.job_id, lock=True)
        if current is None or current.owner != self._owner or current.status is not JobStatus.RUNNING:
            raise ConflictError(f"{self._job.job_id} was cancelled, paused or taken over meanwhile")
        return current

    def _update(self, c: Connection, **values: Any) -> None:
        jobs.update(c, self._check(c), progress=self._progress.known, **values)
