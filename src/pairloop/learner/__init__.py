"""Training of one version from one snapshot of training rows, as a process: ``python -m pairloop.learner JOB.json``.

``job`` says what to do and what came of it, ``child`` starts and watches the process; both import neither torch nor
transformers, and so does importing this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pairloop.learner.job import TrainJob, TrainResult
from pairloop.learner.workers import ALONE, Workers


def ignore(_: Mapping[str, Any]) -> None:
    """The report that nobody reads."""


def train(job: TrainJob, report: Callable[[Mapping[str, Any]], None] = ignore, *, workers: Workers = ALONE) -> TrainResult:
    """Train as ``job`` says, resuming from its last checkpoint, and write its output folder, metrics file and result file.

    ``report`` gets each row of the metrics file as it is written. Errors become a result with status ``failed``, a stable code
    and whose fault it was; only what the machine does to the process itself (a kill, an interrupt) is not caught. Where
    there are several ``workers``, each calls it; WorkerLost where another one was killed.
    """
    from pairloop.learner.supervise import supervise  # not above: the child imports torch there, the server never does

    return supervise(job, report, workers)


__all__ = ["TrainJob", "TrainResult", "train"]
