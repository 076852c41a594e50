"""The comparison: arms x tasks x seeds at equal rollouts from one base per task, resumable, as JSONL.

A run is one line of ``runs.jsonl``, written when it is done; a run that is there for the same arm, task, base, budget and
seed is not repeated. Runs do not depend on one another, so they run in as many processes as asked for.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pairloop.errors import UserError
from pairloop.lab import bases
from pairloop.lab.arms import Arm
from pairloop.lab.run import Budget, run
from pairloop.lab.tasks import TASKS
from pairloop.lab.tasks.base import BaseRecipe, Task

RUNS_FILE = "runs.jsonl"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One run that is asked for."""

    arm: Arm
    task: str
    seed: int
    budget: Budget

    @property
    def key(self) -> str:
        """What decides the outcome: sixteen hex digits of arm, task with its base, budget and seed."""
        task = TASKS[self.task]
        base = bases.key(task) if isinstance(task.recipe, BaseRecipe) else _digest(task.recipe.folder / "model.safetensors")
        content = json.dumps([asdict(self.arm), self.task, base, asdict(self.budget), self.seed], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def jobs_of(arms: Collection[Arm], tasks: Iterable[str], seeds: Iterable[int], budget: Budget) -> list[Job]:
    """All combinations; seeds outermost, so that a comparison cut short has all arms.

    Where the budget has no learning rate, the task's own is put in.
    """
    rates = {task: budget.learning_rate or TASKS[task].learning_rate for task in tasks}
    budgets = {task: replace(budget, learning_rate=rate) for task, rate in rates.items()}
    return [Job(arm, task, seed, budgets[task]) for seed in seeds for task in budgets for arm in arms]


def compare(
    jobs: Sequence[Job],
    out_dir: Path,
    cache_dir: Path,
    *,
    workers: int = 1,
    report: Callable[[int, int, Row], None] = lambda _done, _total, _row: None,
) -> list[Row]:
    """The rows of all jobs, in their order: those found in ``out_dir``, and the others run now.

    ``report`` is called after each run that was done now, with the count done so far (found ones included).
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / RUNS_FILE
    found = read(path)
    missing = list({job.key: job for job in jobs if job.key not in found}.values())
    for task in dict.fromkeys(job.task for job in missing):
        bases.base(TASKS[task], cache_dir)  # before the workers ask for it all at once
    done = len({job.key for job in jobs}) - len(missing)
    total = done + len(missing)
    for row in _run_all(missing, cache_dir, workers):
        _append(path, row)
        found[row["key"]] = row
        done += 1
        report(done, total, row)
    return [found[job.key] for job in jobs]


def read(path: Path) -> dict[str, Row]:
    """Rows by key; a half-written last line (of a process that was killed) is left out. UserError names file and line."""
    if not path.is_file():
        return {}
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is not a run of a comparison ({error}); remove the line") from error
    return rows


def _run_all(jobs: Sequence[Job], cache_dir: Path, workers: int) -> Iterable[Row]:
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield run_job(job, cache_dir)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = [pool.submit(run_job, job, cache_dir) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_job(job: Job, cache_dir: Path) -> Row:
    """One run as a row."""
    task: Task = TASKS[job.task]
    found = run(job.arm, task, job.seed, job.budget, cache_dir)
    return {"key": job.key, **found.as_dict(), "spec": asdict(job.arm), "budget": asdict(job.budget)}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _append(path: Path, row: Row) -> None:
    """One whole line at the end; what a killed process left half-written is cut off first."""
    with path.open("a+b") as file:
        file.seek(0)
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
