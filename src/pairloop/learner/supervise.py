"""Runs one job to its result file: errors become a stable code and say whose fault it was. No torch."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pairloop.errors import ConfigError, ModelError, RowsError, UserError, log_failure
from pairloop.formats.snapshot import TRAIN_FILE
from pairloop.learner.data import UnfitRows, read_split, refuse_unfit
from pairloop.learner.files import exclusive
from pairloop.learner.job import ERROR_CODES, FAKE, LOCK, TrainError, TrainJob, TrainResult, TrainStatus, nothing_to_train
from pairloop.learner.workers import WorkerLost, Workers, is_lost, joined

LOG = logging.getLogger(__name__)

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class Diverged(UserError):
    """Loss or gradient were not finite several steps in a row."""


class CheckpointMismatch(UserError):
    """The checkpoint belongs to other data, another model or other settings."""


_USER_CODES: tuple[tuple[type[UserError], str], ...] = (
    (Diverged, "nan"),
    (CheckpointMismatch, "checkpoint_mismatch"),
    (ModelError, "bad_model"),
    (RowsError, "bad_rows"),
    (UnfitRows, "unfit_rows"),
    (ConfigError, "bad_settings"),
    (UserError, "bad_input"),
)


def supervise(job: TrainJob, report: Callable[[Mapping[str, Any]], None], workers: Workers) -> TrainResult:
    """Train, and leave a result file; a result that is there already is returned as it is.

    The leading worker leaves the result, but of a failure the worker that failed first: the others then wait for it, or end
    with WorkerLost.
    """
    started_s = time.monotonic()
    result_path = Path(job.result_path)
    for path in (result_path.parent, Path(job.out_dir).parent, Path(job.checkpoint_dir)):
        path.mkdir(parents=True, exist_ok=True)
    with exclusive(Path(job.checkpoint_dir) / LOCK) if workers.leads else nullcontext():
        found = workers.broadcast(_standing(job) if workers.leads else None)
        if found is not None:
            return found
        try:
            result = _train(job, report, workers)
        except Exception as error:  # the one supervisor line: whatever it was, it is logged and recorded
            if workers.size > 1 and is_lost(error):
                raise WorkerLost(f"worker {workers.rank}: another worker is gone ({error})") from error
            log_failure(LOG, error, "training failed")
            wall_s = time.monotonic() - started_s
            result = TrainResult(TrainStatus.FAILED, error=classify(error), cpu_s=time.process_time(), wall_s=wall_s)
            result.save_first(result_path, f"worker-{workers.rank}")
        else:
            if workers.leads:
                result.save(result_path)
    return result


def work(job: TrainJob) -> TrainResult:
    """One worker's part of a run whose workers a launcher has started."""
    try:
        with joined(job) as workers:
            if not workers.leads:
                logging.getLogger("pairloop").setLevel(logging.ERROR)  # the leading one says it all
            return supervise(job, lambda _: None, workers)
    except ConfigError as error:  # of joining: there are fewer devices than workers
        result = TrainResult(TrainStatus.FAILED, error=classify(error))
        result.save_first(Path(job.result_path), f"worker-{os.getpid()}")
        return result


def classify(error: BaseException) -> TrainError:
    """Code, whose fault, and a sentence with the remedy."""
    code, text = _code_of(error), str(error) or type(error).__name__
    if code == "out_of_memory":
        remedy = (
            "set train.max_tokens_per_batch lower, or train.gradient_checkpointing = true, or train.max_length lower, or "
            'policy.method = "lora"'
        )
        text = f"the device ran out of memory; {remedy} ({text[:200]})"
    elif code == "disk_full":
        text = f"the disk is full: free some space and start the run again ({text})"
    elif code == "crash":
        text = f"{type(error).__name__}: {text}"
    return TrainError(code, ERROR_CODES[code], text)


def _code_of(error: BaseException) -> str:
    for kind, code in _USER_CODES:
        if isinstance(error, kind):
            return code
    if is_out_of_memory(error):
        return "out_of_memory"
    if (isinstance(error, OSError) and error.errno in _FULL_DISK) or "No space left on device" in str(error):
        return "disk_full"
    return "io_error" if isinstance(error, OSError) else "crash"


def is_out_of_memory(error: BaseException) -> bool:
    """True where the machine's or the device's memory did not suffice, by what torch and Python say then."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _standing(job: TrainJob) -> TrainResult | None:
    """The result that an earlier attempt left, if it is final; one that is not is removed."""
    path = Path(job.result_path)
    found = TrainResult.load(path)
    if found is not None and _stands(found, job):
        return found
    path.unlink(missing_ok=True)
    return None


def _stands(result: TrainResult, job: TrainJob) -> bool:
    if result.status is TrainStatus.SUCCEEDED:
        return Path(job.out_dir).is_dir()
    return result.status is TrainStatus.NOTHING_TO_TRAIN


def _train(job: TrainJob, report: Callable[[Mapping[str, Any]], None], workers: Workers) -> TrainResult:
    rows = read_split(Path(job.snapshot_dir), TRAIN_FILE)
    refuse_unfit(rows, job.train.objective)
    if len(rows) < job.train.min_pairs:
        return nothing_to_train(len(rows), {})
    if job.base_dir == FAKE:
        from pairloop.learner.fake import train_fake

        # Without a model there is nothing to share.
        return workers.broadcast(train_fake(job, rows, report) if workers.leads else nothing_to_train(0, {}))
    from pairloop.learner.loop import train_model  # torch: only where there is something to train

    result = train_model(job, rows, report, workers)
    if workers.leads and result.status is TrainStatus.SUCCEEDED:
        for folder in Path(job.checkpoint_dir).glob("step-*"):
            shutil.rmtree(folder)
    return result
