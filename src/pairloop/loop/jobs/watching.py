"""Training runs as people watch them: those of cycles and those of fine-tuning jobs, in one shape."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import NotFoundError, PairloopError
from pairloop.learner.child import Row, log_tail
from pairloop.learner.job import TrainJob
from pairloop.learner.reading import Rows, sample_rows
from pairloop.loop import train
from pairloop.store import Store, cycles, datasets, files, jobs, runs, versions
from pairloop.store.jobs import Job, JobStatus
from pairloop.types import Run, RunStatus, Version

Kind = Literal["cycle", "job"]

LOG_BYTES = 16_000
_OF_CSV = {
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "learning_rate": "lr",
}
"""The columns of a job's metrics file (see `results`) by their names in the metrics rows; the others are called the same."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A run, its status in the words of its kind.

    ``cycle``: the number of the cycle that it belongs to. ``step`` of ``of``: how far it is. ``version``: what it made.
    ``stopped_because``, ``stop_message``, ``warnings``: see `pairloop.learner.job.TrainResult`. ``folder``: where its files lie
    on the machine that trains it. ``metrics_file``: of a job that has ended, which keeps no folder. ``owner``: who holds it.
    """

    run_id: str
    kind: Kind
    cycle_id: str | None
    status: str
    is_live: bool
    is_paused: bool
    policy: str
    parent: int
    version: Version | None
    cycle: int | None
    dataset_id: str | None
    attempt: int
    owner: str | None
    started_at: datetime
    ended_at: datetime | None
    heartbeat_at: datetime | None
    step: int | None
    of: int | None
    stopped_because: str
    stop_message: str
    warnings: tuple[str, ...]
    error: str | None
    result: Mapping[str, Any]
    folder: Path
    metrics_file: str | None = None

    @property
    def seconds(self) -> float:
        """How long it took, or has taken so far."""
        ended = self.ended_at or datetime.now(UTC)
        return max(0.0, (ended - self.started_at).total_seconds())


@dataclass(frozen=True, slots=True)
class Figures:
    """A run's metrics rows; ``why_none``: where there are none to be had here. ``is_whole``: see `Rows`."""

    rows: list[Row]
    is_whole: bool
    why_none: str | None = None


def of_cycles(c: Connection, config: Config, limit: int, *, after: str | None = None) -> list[TrainingRun]:
    """The runs of the policy's cycles, newest first."""
    found = runs.list_(c, config.policy.name, limit, after=after)
    made = versions.by_runs(c, config.policy.name, [run.run_id for run in found])
    return [_of_run(c, config, run, made.get(run.run_id)) for run in found]


def of_jobs(c: Connection, config: Config, limit: int, *, after: str | None = None) -> list[TrainingRun]:
    """Fine-tuning jobs, newest first."""
    return [_of_job(c, config, job) for job in islice(jobs.walk(c, after=after), limit)]


def find(c: Connection, config: Config, run_id: str, *, param: str = "run") -> TrainingRun:
    """A cycle's run or a fine-tuning job by its id; NotFoundError (naming ``param``) where there is none."""
    run = runs.get(c, run_id)
    if run is not None and run.policy == config.policy.name:
        return _of_run(c, config, run, versions.by_runs(c, run.policy, [run_id]).get(run_id))
    job = jobs.get(c, run_id)
    if job is not None:
        return _of_job(c, config, job)
    raise NotFoundError(f"no training run or fine-tuning job {run_id!r}", param=param)


def figures(store: Store, run: TrainingRun) -> Figures:
    """The metrics rows that are kept here, a selection where there are very many."""
    found = sample_rows(run.folder / "metrics.jsonl")
    if not found.rows and run.metrics_file is not None:
        found = _of_file(store, run.metrics_file)
    if found.rows:
        return Figures(found.rows, found.is_whole)
    if run.is_live and run.step is None:
        return Figures([], True, "No step is done yet: the model is loaded and the reference's log-probs are checked first.")
    if run.step:
        who = f", which {run.owner} trained," if run.owner else ""
        return Figures([], True, f"The metrics file of this run{who} is not on this machine, or was removed.")
    return Figures([], True, "This run ended before its first step.")


def log_of(run: TrainingRun) -> str:
    """The end of what the training process wrote, if it lies here."""
    return log_tail(run.folder / "child.log", LOG_BYTES)


def recipe_of(c: Connection, run: TrainingRun) -> dict[str, Any]:
    """What decided the weights, as key and value with dots; empty where it is not known."""
    recipe: Mapping[str, Any] = ((run.version.record or {}).get("recipe") if run.version is not None else None) or {}
    if not recipe:
        with suppress(OSError, ValueError, KeyError, TypeError):
            recipe = TrainJob.load(run.folder / "job.json").recipe()
    job = jobs.get(c, run.run_id) if not recipe and run.kind == "job" else None
    return dict(_flat(recipe if job is None else job.method))


def rows_trained_on(c: Connection, run: TrainingRun) -> int | None:
    """How many training rows its dataset has."""
    dataset = None if run.dataset_id is None else datasets.get(c, run.dataset_id)
    return None if dataset is None else dataset.n_train


def _of_run(c: Connection, config: Config, run: Run, version: Version | None) -> TrainingRun:
    cycle = None if run.cycle_id is None else cycles.get(c, run.cycle_id)
    result, progress = run.result, run.progress
    is_live = run.status is RunStatus.RUNNING
    return TrainingRun(
        run_id=run.run_id,
        kind="cycle",
        cycle_id=run.cycle_id,
        status=run.status.value,
        is_live=is_live,
        is_paused=False,
        policy=run.policy,
        parent=run.parent,
        version=version,
        cycle=None if cycle is None else cycle.number,
        dataset_id=run.dataset_id,
        attempt=run.attempt,
        owner=run.owner,
        started_at=run.created_at,
        ended_at=None if is_live else run.heartbeat_at,
        heartbeat_at=run.heartbeat_at,
        step=result.get("steps") or progress.get("step"),
        of=result.get("steps_planned") or progress.get("of"),
        stopped_because=result.get("stopped_because") or "",
        stop_message=result.get("stop_message") or "",
        warnings=tuple(result.get("warnings") or ()),
        error=run.error,
        result=result,
        folder=train.folder_of(config, run),
    )


def _of_job(c: Connection, config: Config, job: Job) -> TrainingRun:
    made = versions.of_job(c, job.job_id)
    version = next((one for one in made if one.step_number is None), None)
    record = version.record if version is not None else None
    result: Mapping[str, Any] = (record or {}).get("result") or {}
    return TrainingRun(
        run_id=job.job_id,
        kind="job",
        cycle_id=None,
        status="paused" if job.paused and not job.status.is_terminal else job.status.value,
        is_live=not job.status.is_terminal and not job.paused,
        is_paused=job.paused and not job.status.is_terminal,
        policy=job.policy,
        parent=job.parent,
        version=version,
        cycle=None,
        dataset_id=job.dataset_id,
        attempt=job.attempt,
        owner=job.owner,
        started_at=job.created_at,
        ended_at=job.finished_at,
        heartbeat_at=job.heartbeat_at,
        step=result.get("steps") or job.progress.get("step"),
        of=result.get("steps_planned") or job.progress.get("of"),
        stopped_because="cancelled" if job.status is JobStatus.CANCELLED else result.get("stopped_because") or "",
        stop_message=result.get("stop_message") or "",
        warnings=tuple(result.get("warnings") or ()),
        error=None if job.error is None else str(job.error.get("message")),
        result=result,
        folder=(config.runs_dir / job.job_id).resolve(),
        metrics_file=next(iter(job.result_files), None),
    )


def _of_file(store: Store, file_id: str) -> Rows:
    """The rows of a job's metrics file; none where it is gone."""
    with store.reading() as c:
        file = files.get(c, file_id)
    if file is None:
        return Rows([], True)
    try:
        with store.artifacts.local(file.path).open(encoding="utf-8", newline="") as lines:
            return Rows([_row_of(line) for line in csv.DictReader(lines) if line.get("train_loss") is not None], True)
    except (OSError, PairloopError):
        return Rows([], True)


def _row_of(line: Mapping[str, str]) -> Row:
    row: dict[str, Any] = {_OF_CSV.get(name, name): float(value) for name, value in line.items() if value}
    if "valid_loss" in row:
        row["heldout_loss"] = row.pop("valid_loss")
    return row


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(recipe.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
