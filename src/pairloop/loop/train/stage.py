"""The loop's stage: a run row, the training, and the version that comes out, published and registered.

Every part can be killed at any moment: the next call for the same cycle takes up the run, the child goes on from its last
checkpoint, and a version is published and registered once.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import Config, duration_s
from pairloop.errors import ConflictError, NotFoundError, StoreError, UnavailableError
from pairloop.learner.child import Row, read_rows
from pairloop.learner.job import DISK_FULL, TrainJob, TrainResult, TrainStatus
from pairloop.loop.train.attempts import Listener, OnProgress, Start, attempt, job_in
from pairloop.loop.train.elsewhere import Shared, attempt_shared, forget
from pairloop.store import Store, cycles, new_id, runs, versions
from pairloop.types import Dataset, Run, RunStatus, Version, VersionKind

LOG = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class TrainRecord:
    """How the stage ended. ``version``: the new one where it succeeded. Status RUNNING: stopped, to be taken up later."""

    run_id: str
    status: RunStatus
    version: Version | None
    result: Mapping[str, Any]


def run(
    store: Store,
    config: Config,
    *,
    dataset: Dataset,
    parent: Version,
    cycle_id: str | None = None,
    owner: str,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    also_recorded: Mapping[str, Any] | None = None,
) -> TrainRecord:
    """Train ``parent`` on ``dataset`` and register the version; with a cycle, at most once for it, whatever happened before.

    The caller holds the policy's lease. ``on_progress`` gets each metrics row; ``should_stop`` pauses the run; the version's
    record holds ``also_recorded`` beside recipe and result. Raises ConfigError where method and parent do not go together,
    ConflictError where the cycle was cancelled, UnavailableError where the disk is full: the next call goes on from the last
    checkpoint. Every failure of the training itself is a record.
    """
    row = _take_up(store, config, dataset, parent, cycle_id, owner)
    faults.reach("run.taken_up")
    if row.status is not RunStatus.RUNNING:
        _tidy(store, folder_of(config, row))
        return TrainRecord(row.run_id, row.status, _version_of(store, row), row.result)
    folder, hold = folder_of(config, row), store.artifacts.hold
    heart = _Heart(store, row, duration_s(config.schedule.lease), on_progress)
    start = Start.of(config.policy.model, parent, hold)
    job = job_in(folder, config, start=start, data=hold(dataset.path), train=config.train)
    try:
        shared = Shared(store.artifacts, lambda: _has_ended(store, row))
        result = attempt_shared(shared, job, lambda: attempt(job, folder, heart, should_stop))
    except ConflictError:  # another process took it over, or it was cancelled
        with store.reading() as c:
            ended = runs.get(c, row.run_id)
        if ended is not None and ended.status is RunStatus.CANCELLED:
            _tidy(store, folder)
        raise
    if result.status is TrainStatus.PAUSED:
        return TrainRecord(row.run_id, RunStatus.RUNNING, None, {})
    if result.error is not None and result.error.code == DISK_FULL:
        raise UnavailableError(f"run {row.run_id}: {result.error.message}")
    version = _register(store, row, job, result, also_recorded)
    faults.reach("run.ended")
    _tidy(store, folder)
    return TrainRecord(row.run_id, _status(result), version, result.as_dict())


def _tidy(store: Store, folder: Path) -> None:
    """Remove what an ended run needs no longer."""
    for name in ("out", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    forget(store.artifacts, folder.name)


def folder_of(config: Config, row: Run) -> Path:
    """Where the run's files lie: one folder for all attempts, named by the first."""
    return (config.runs_dir / runs.folder_name(row)).resolve()


def metrics_of(config: Config, row: Run) -> list[Row]:
    """The metrics rows of a run so far, one per optimizer step; those with ``heldout`` are looks in between."""
    return read_rows(folder_of(config, row) / "metrics.jsonl")[0]


def _take_up(store: Store, config: Config, dataset: Dataset, parent: Version, cycle_id: str | None, owner: str) -> Run:
    """The cycle's run if it has one, else a new row. A run whose owner is gone goes on as a new attempt in the same folder."""
    now = datetime.now(UTC)
    fresh = Run(
        run_id=new_id("run"),
        policy=config.policy.name,
        cycle_id=cycle_id,
        dataset_id=dataset.dataset_id,
        parent=parent.number,
        status=RunStatus.RUNNING,
        owner=owner,
        attempt=1,
        lease_expires_at=now + timedelta(seconds=duration_s(config.schedule.lease)),
        heartbeat_at=now,
        progress={},
        result={},
        error=None,
        created_at=now,
    )

    def take(c: Connection) -> Run:
        cycle = cycles.get(c, cycle_id) if cycle_id is not None else None
        if cycle is not None and cycle.state.is_terminal:
            raise ConflictError(f"cycle {cycle.number} of {cycle.policy} has ended ({cycle.state}); it trains no more")
        found = runs.for_cycle(c, cycle_id) if cycle_id is not None else None
        if found is not None and (found.status is not RunStatus.RUNNING or found.owner == owner):
            return found
        row = fresh
        if found is not None:
            progress = {**found.progress, "folder": runs.folder_name(found)}
            row = replace(fresh, attempt=found.attempt + 1, progress=progress)
            runs.end(c, found.run_id, RunStatus.SYSTEM_ERROR, {}, f"its process ended; {row.run_id} goes on with it", now)
        runs.insert(c, row)
        return row

    return store.write(take)


def _has_ended(store: Store, row: Run) -> bool:
    """Whether nobody goes on with it, be it as another attempt."""
    with store.reading() as c:
        newest = runs.get(c, row.run_id) if row.cycle_id is None else runs.for_cycle(c, row.cycle_id)
    return newest is None or newest.status is not RunStatus.RUNNING


class _Heart(Listener):
    """Copies the last row into the run row, and renews the run's lease, about once a second.

    A store that cannot write just now (another process holds its lock) does not stop the training: what must not be lost is
    written at the end, and a run that another process took over is a ConflictError.
    """

    def __init__(self, store: Store, row: Run, lease_s: float, on_progress: OnProgress | None) -> None:
        super().__init__(on_progress)
        self._store, self._row, self._lease_s = store, row, lease_s
        self._progress: dict[str, Any] = {**row.progress, "folder": runs.folder_name(row)}
        self._beat_at_s = float("-inf")

    def hear(self, rows: Sequence[Row]) -> None:
        super().hear(rows)
        for row in rows:
            self._progress |= row
        if time.monotonic() - self._beat_at_s >= HEARTBEAT_S:  # not by the wall clock, which may jump
            self.flush()

    def flush(self) -> None:
        self._beat_at_s, now = time.monotonic(), datetime.now(UTC)
        until, progress = now + timedelta(seconds=self._lease_s), dict(self._progress)
        try:
            self._store.write(
                lambda c: runs.heartbeat(
                    c, self._row.run_id, owner=self._row.owner, at=now, lease_expires_at=until, progress=progress
                )
            )
        except StoreError as error:
            LOG.warning("run %s: the heartbeat could not be written: %s", self._row.run_id, error)


def _register(
    store: Store, row: Run, job: TrainJob, result: TrainResult, also_recorded: Mapping[str, Any] | None
) -> Version | None:
    """Publish the folder, then insert the version and end the run in one transaction."""
    now = datetime.now(UTC)
    if result.status is not TrainStatus.SUCCEEDED:
        message = result.error.message if result.error else None
        store.write(lambda c: runs.end(c, row.run_id, _status(result), result.as_dict(), message, now))
        return None
    manifest = _manifest(row, job, result)
    artifact = store.artifacts.publish(Path(job.out_dir), manifest)
    faults.reach("run.published")

    def register(c: Connection) -> Version:
        version = Version(
            policy=row.policy,
            number=versions.next_number(c, row.policy),
            kind=VersionKind.FULL if job.method == "full" else VersionKind.ADAPTER,
            path=str(artifact.path),
            artifact_hash=artifact.hash,
            parent=row.parent,
            dataset_id=row.dataset_id,
            run_id=row.run_id,
            created_at=now,
            # Not only in the folder: its files may go by their age, and the same weights may be another version's.
            record={**manifest, **(also_recorded or {})},
        )
        versions.insert(c, version)
        runs.end(c, row.run_id, RunStatus.SUCCEEDED, result.as_dict(), None, now)
        return version

    return store.write(register)


def _manifest(row: Run, job: TrainJob, result: TrainResult) -> dict[str, Any]:
    """What is needed to make the version again, and what came out."""
    return {
        "noun": "version",
        "policy": row.policy,
        "parent": row.parent,
        "dataset_id": row.dataset_id,
        "run_id": row.run_id,
        "cycle_id": row.cycle_id,
        "recipe": job.recipe(),
        "result": result.as_dict(),
    }


def _status(result: TrainResult) -> RunStatus:
    if result.error is not None:
        return RunStatus(result.error.kind)
    return RunStatus.SUCCEEDED if result.status is TrainStatus.SUCCEEDED else RunStatus.NOTHING_TO_TRAIN


def _version_of(store: Store, row: Run) -> Version | None:
    with store.reading() as c:
        found = [version for version in versions.list_(c, row.policy) if version.run_id == row.run_id]
    if row.status is RunStatus.SUCCEEDED and not found:
        raise NotFoundError(f"run {row.run_id} succeeded, but its version is not in the store; run `pairloop doctor`")
    return found[0] if found else None
