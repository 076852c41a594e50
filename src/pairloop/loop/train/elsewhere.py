"""A run's newest checkpoint, shared where the artifacts are: another machine that takes the run up goes on from it."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pairloop.errors import StoreError, UnavailableError
from pairloop.learner.files import whole_folder
from pairloop.learner.job import TrainJob, TrainResult, TrainStatus, last_checkpoint, rewind_metrics
from pairloop.store import Artifacts
from pairloop.store.checkpoints import FarCheckpoints

LOG = logging.getLogger(__name__)

EVERY_S = 0.2
METRICS = "metrics.jsonl"
SENDING = "sending"


def attempt_shared(artifacts: Artifacts, job: TrainJob, attempt: Callable[[], TrainResult]) -> TrainResult:
    """``attempt`` (see `attempts.attempt`), from the newest checkpoint of any machine on, while those it makes are shared.

    One that fits the settings here no longer, as after an upgrade of the base elsewhere, is left: the run begins anew.
    """
    folder = Path(job.result_path).parent
    far = artifacts.checkpoints(folder.name)
    if far is None:
        return attempt()
    brought = _bring(far, job)
    result = _sharing(far, job, attempt)
    if brought and result.error is not None and result.error.code == "checkpoint_mismatch":
        LOG.warning("%s: the checkpoint of another machine does not fit: the run begins anew", folder.name)
        far.clear()
        shutil.rmtree(job.checkpoint_dir)
        result = _sharing(far, job, attempt)
    return result


def forget(artifacts: Artifacts, folder: Path) -> None:
    """Remove what was shared of a run that has ended; what cannot be reached now is named by the doctor a day later."""
    far = artifacts.checkpoints(folder.name)
    try:
        if far is not None:
            far.clear()
    except StoreError as error:
        LOG.warning("%s: its shared checkpoint could not be removed: %s", folder.name, error)


def _bring(far: FarCheckpoints, job: TrainJob) -> bool:
    """True where another machine had come further than what lies here, which then lies here, with the rows of its metrics."""
    here, step = last_checkpoint(Path(job.checkpoint_dir)), far.newest()
    if step is None or (here is not None and here[0] >= step):
        return False
    try:
        with whole_folder(Path(job.checkpoint_dir) / f"step-{step:08d}") as folder:
            far.fetch(step, folder)
            (folder / METRICS).replace(job.metrics_path)
    except UnavailableError:  # it is tried again
        raise
    except StoreError as error:
        LOG.warning("%s: step %d cannot be gone on from here: %s", job.run_id, step, error)
        return False
    LOG.info("%s: goes on from step %d, which another machine had reached", job.run_id, step)
    return True


def _sharing(far: FarCheckpoints, job: TrainJob, attempt: Callable[[], TrainResult]) -> TrainResult:
    sender = _Sender(far, job)
    with sender.beside():
        result = attempt()
    if result.status is TrainStatus.PAUSED:  # perhaps for another machine
        sender.send()
    return result


class _Sender:
    """Uploads the newest checkpoint while the next one is made; what the training has passed meanwhile is left out."""

    def __init__(self, far: FarCheckpoints, job: TrainJob) -> None:
        self._far, self._job = far, job
        self._sent = far.newest() or 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        done = threading.Event()

        def work() -> None:
            while not done.wait(EVERY_S):
                self.send()

        thread = threading.Thread(target=work, name="checkpoints", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

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
