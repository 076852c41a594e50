"""Two real processes that train together over gloo, without the seconds that a launcher needs to import torch twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pairloop.learner import TrainJob, TrainResult, scores, workers
from pairloop.learner.supervise import work
from pairloop.learner.workers import Workers

PRELOADED = ["pytest", "pairloop.learner.loop", "peft", "torch.distributed.fsdp", "torch.distributed.tensor"]
PATIENCE_S = 120


def two_workers(jobs: Sequence[TrainJob], store: Path, before: Callable[[int], None] | None = None) -> list[int | None]:
    """Do the jobs, one after the other, in two processes that are joined through the file ``store``; their exit codes.

    ``before`` is called in each with its rank. The processes are forked from one that has imported everything.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [context.Process(target=_work, args=(rank, jobs, store, before), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} of the workers hung"
    return [process.exitcode for process in processes]


def _work(rank: int, jobs: Sequence[TrainJob], store: Path, before: Callable[[int], None] | None) -> None:
    # In a session of its own the worker is nobody's business but this test's.
    os.setsid()
    if before is not None:
        before(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for job in jobs:
        result: TrainResult = work(job)
        if result.error is not None:
            os._exit(result.exit_code)
    dist.destroy_process_group()


# ---- faults, planted in the workers before they start


def mean_for_sum(_: int) -> None:
    """The usual mistake: gradients averaged over workers, each of which has divided by the whole batch's totals already."""
    right = workers._sum

    def wrong(bucket: Any) -> None:
        right(bucket)
        for tensor in bucket:
            tensor.div_(2)

    workers._sum = wrong
    Workers.loss_factor = 1  # type: ignore[assignment, method-assign]


def no_memory_in_the_second(rank: int) -> None:
    if rank == 1:

        def fail(*_: Any, **__: Any) -> None:
            raise MemoryError("out of memory")

        torch.optim.AdamW.step = fail  # type: ignore[method-assign]


def killed_in_the_second(rank: int, *, at: int = 1) -> None:
    """kill -9 in step ``at``."""
    if rank == 1:
        right, steps = torch.optim.AdamW.step, count(1)

        def step(*arguments: Any, **options: Any) -> Any:
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return right(*arguments, **options)

        torch.optim.AdamW.step = step  # type: ignore[method-assign]


def short_of_memory_once_in_the_second(rank: int) -> None:
    if rank == 1:
        inside: Any = scores
        right = inside.completion_logps
        passes = count()

        def fail(*sequences: Any) -> Any:
            if torch.is_grad_enabled() and next(passes) == 1:
                raise MemoryError
            return right(*sequences)

        inside.completion_logps = fail
