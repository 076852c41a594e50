"""A run's newest checkpoint, shared where the artifacts are: another machine that takes the run up goes on from it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pairloop import faults
from pairloop.errors import StoreError, UnavailableError
from pairloop.learner.child import read_rows
from pairloop.learner.files import whole_folder
from pairloop.learner.job import TrainJob, TrainResult, TrainStatus, last_checkpoint, rewind_metrics
from pairloop.loop.background import repeating
from pairloop.store import Artifacts
from pairloop.store.checkpoints import FarCheckpoints

LOG = logging.getLogger(__name__)

EVERY_S = 0.2
METRICS = "metrics.jsonl"
SENDING = "sending"


@dataclass(frozen=True, slots=True)
class Shared:
    """Where a run's checkpoints are shared.

    ``has_ended``: whether the run has ended, here or elsewhere; StoreError where that cannot be read now. ``is_kept``: whether
    the model after the epoch that ended with this step is kept where all machines find it.
    """

    artifacts: Artifacts
    has_ended: Callable[[], bool]
    is_kept: Callable[[int], bool] = lambda _: True


def attempt_shared(shared: Shared, job: TrainJob, attempt: Callable[[], TrainResult]) -> TrainResult:
    """``attempt`` (see `attempts.attempt`), from the newest checkpoint of any machine on, while those it makes are shared.

    One that fits the settings here no longer, as after an upgrade of the base elsewhere, is left: the run begins anew.
    """
    name = Path(job.result_path).parent.name
    far = shared.artifacts.checkpoints(name)
    if far is None:
        return attempt()
    sender = _Sender(far, job, shared.is_kept)
    try:
        brought = _bring(far, job)
        result = sender.beside(attempt)
        if brought and result.error is not None and result.error.code == "checkpoint_mismatch":
            LOG.warning("%s: the checkpoint of another machine does not fit: the run begins anew", name)
            far.clear()
            shutil.rmtree(job.checkpoint_dir)
            result = sender.beside(attempt)
        return result
    finally:
        _leave_nothing(shared, name)


def forget(artifacts: Artifacts, name: str) -> None:
    """Remove what was shared of a run that has ended; what cannot be reached now is named by the doctor a day later."""
    far = artifacts.checkpoints(name)
    try:
        if far is not None:
            far.clear()
    except StoreError as error:
        LOG.warning("%s: its shared checkpoint could not be removed: %s", name, error)


def _leave_nothing(shared: Shared, name: str) -> None:
    """Whoever ended the run removed what lay there; what this process was uploading just then came after that."""
    try:
        if shared.has_ended():
            forget(shared.artifacts, name)
    except StoreError as error:
        LOG.warning("%s: whether it has ended could not be read: %s", name, error)


def _bring(far: FarCheckpoints, job: TrainJob) -> bool:
    """True where another machine had come further than what lies here, which then lies here, with the rows of its metrics."""
    here, step = last_checkpoint(Path(job.checkpoint_dir)), far.newest()
    if step is None or (here is not None and here[0] >= step):
        return False
    try:
        with whole_folder(Path(job.checkpoint_dir) / f"step-{step:08d}") as folder:
            far.fetch(step, folder)
            (folder / METRICS).replace(job.metrics_path)
            faults.reach("checkpoint.before_brought")
    except UnavailableError:  # it is tried again
        raise
    except StoreError as error:
        LOG.warning("%s: step %d cannot be gone on from here: %s", job.run_id, step, error)
        return False
    LOG.info("%s: goes on from step %d, which another machine had reached", job.run_id, step)
    return True


class _Sender:
    """Uploads the newest checkpoint while the next one is made; what the training has passed meanwhile is left out."""

    def __init__(self, far: FarCheckpoints, job: TrainJob, is_kept: Callable[[int], bool]) -> None:
        self._far, self._job, self._is_kept = far, job, is_kept
        self._sent = 0

    def beside(self, attempt: Callable[[], TrainResult]) -> TrainResult:
        """``attempt``, with what it leaves where it was paused: perhaps it goes on elsewhere."""
        self._sent = self._far.newest() or 0
        with repeating(self.send, every_s=EVERY_S, name="checkpoints"):
            result = attempt()
        if result.status is TrainStatus.PAUSED:
            self.send()
        return result

    def send(self) -> None:
        """The newest one, unless it is there; a URL that cannot be reached stops no training."""
        found = last_checkpoint(Path(self._job.checkpoint_dir))
        if found is None or found[0] <= self._sent:
            return
        step, folder = found
        try:
            with _held(folder, Path(self._job.metrics_path), step) as copy:
                if last_checkpoint(folder.parent) != found:  # it goes already, and of the copy something may be missing
                    return
                if not all(self._is_kept(row["step"]) for row in read_rows(copy / METRICS)[0] if "epoch" in row):
                    return  # who went on from it would miss that model
                self._far.put(step, copy)
            self._sent = step
        except FileNotFoundError:  # the next one is whole, and this one has gone
            return
        except (StoreError, OSError) as error:
            LOG.warning("%s: the checkpoint of step %d could not be shared: %s", self._job.run_id, step, error)


@contextmanager
def _held(checkpoint: Path, metrics: Path, step: int) -> Iterator[Path]:
    """The files under second names, which stay when the training removes the checkpoint, with the metrics up to ``step``."""
    copy = checkpoint.parent / SENDING
    shutil.rmtree(copy, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, copy, copy_function=_link)
        shutil.copyfile(metrics, copy / METRICS)
        rewind_metrics(copy / METRICS, step)
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
