"""Train: a snapshot of preference pairs and a parent become a new version, or the finding that there is nothing to train.

The training itself runs in a child process (`pairloop.learner`), so that a crash or too little memory never takes serving
down; this process writes the run row, follows the child's metrics file, publishes the folder that comes out, and registers
the version. Every part can be killed at any moment: the next call for the same cycle takes up the run, the child goes on from
its last checkpoint, and a version is published and registered once. `train_file` does the same without store and server.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from pairloop.config import Config, duration_s
from pairloop.errors import ConfigError, NotFoundError, StoreError, TrainingError, UserError
from pairloop.formats import snapshot
from pairloop.formats.snapshot import HELDOUT_FILE, TRAIN_FILE
from pairloop.learner.child import Row, follow, log_tail, read_rows, started
from pairloop.learner.files import is_held
from pairloop.learner.job import FAKE, LOCK, TrainError, TrainJob, TrainResult, TrainStatus, last_checkpoint, rewind_metrics
from pairloop.policy.engine import resolve_model
from pairloop.store import Store, new_id, runs, versions
from pairloop.types import Dataset, PreferencePair, Run, RunStatus, Version, VersionKind

LOG = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Starts of a child in a row that reach no new checkpoint, before the run is given up."""
HEARTBEAT_S = 1.0

OnProgress = Callable[[Row], None]


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
) -> TrainRecord:
    """Train ``parent`` on ``dataset`` and register the version; with a cycle, at most once for it, whatever happened before.

    The caller holds the policy's lease. ``on_progress`` gets each metrics row. Raises ConfigError where method and parent
    do not go together; every failure of the training itself is a record.
    """
    row = _take_up(store, config, dataset, parent, cycle_id, owner)
    if row.status is not RunStatus.RUNNING:
        return TrainRecord(row.run_id, row.status, _version_of(store, row), row.result)
    folder = folder_of(config, row)
    folder.mkdir(parents=True, exist_ok=True)
    job = _job(store, config, dataset, parent, folder)
    heart = _Heart(store, row, duration_s(config.schedule.lease), on_progress)
    result = _attempts(job, folder, heart, should_stop)
    if result is None:
        return TrainRecord(row.run_id, RunStatus.RUNNING, None, {})
    version = _register(store, row, job, result)
    for name in ("out", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return TrainRecord(row.run_id, _status(result), version, result.as_dict())


def train_file(
    pairs: Sequence[PreferencePair],
    model: str,
    out: Path,
    config: Config | None = None,
    *,
    heldout: Sequence[PreferencePair] = (),
    resume: bool = False,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Train ``model`` (a directory, a hub id, or ``starter``) on ``pairs`` in a child process, and write ``out``.

    Uses neither store nor server; ``config`` says how to train. ``out`` is whole or absent; metrics and result are in
    ``out/training``. A killed call is resumed with ``resume``. Returns a result that succeeded or had nothing to train;
    raises UserError (``out`` in use, bad model, bad settings, divergence) or TrainingError (memory, disk, a child that died).
    """
    config = config or Config()
    out = out.resolve()
    folder = out.with_name(f".{out.name}.training")
    finished = TrainResult.load(out / "training" / "result.json") if resume else None
    if finished is not None:
        return finished
    _refuse_occupied(out, folder, resume=resume)
    base_dir = model if model == FAKE else str(resolve_model(model).resolve())
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    snapshot.write(data / TRAIN_FILE, pairs)
    snapshot.write(data / HELDOUT_FILE, heldout)
    run_id = f"train_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    settings = {**_base_settings(), **_settings(config), "run_id": run_id}
    job = TrainJob.in_folder(folder, base_dir=base_dir, snapshot_dir=str(data), **settings)
    result = _attempts(job, folder, _Listener(on_progress), lambda: False)
    assert result is not None  # nobody could stop it
    if result.status is TrainStatus.SUCCEEDED:
        _deliver(job, folder, out)
    elif result.error is None:
        shutil.rmtree(folder)
    else:
        _raise(result.error, folder)
    return result


def folder_of(config: Config, row: Run) -> Path:
    """Where the run's files lie: one folder for all attempts, named by the first."""
    return (config.runs_dir / str(row.progress.get("folder", row.run_id))).resolve()


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
        found = runs.for_cycle(c, cycle_id) if cycle_id is not None else None
        if found is not None and (found.status is not RunStatus.RUNNING or found.owner == owner):
            return found
        row = fresh
        if found is not None:
            progress = {**found.progress, "folder": folder_of(config, found).name}
            row = replace(fresh, attempt=found.attempt + 1, progress=progress)
            runs.end(c, found.run_id, RunStatus.SYSTEM_ERROR, {}, f"its process ended; {row.run_id} goes on with it", now)
        runs.insert(c, row)
        return row

    return store.write(take)


def _job(store: Store, config: Config, dataset: Dataset, parent: Version, folder: Path) -> TrainJob:
    """The child's orders; ConfigError where method and parent do not go together."""
    wrong = {"full": VersionKind.ADAPTER, "lora": VersionKind.FULL}[config.policy.method]
    if parent.kind is wrong:
        raise ConfigError(
            f'policy.method = "{config.policy.method}", but {parent.name} is of kind {wrong.value}: a policy keeps '
            "its method; set the old one, or start a new policy (another policy.name) from a merged model"
        )
    model = config.policy.model
    root = store.artifacts.root
    return TrainJob.in_folder(
        folder,
        base_dir=model if model == FAKE else str(resolve_model(model).resolve()),
        parent_path=None if parent.kind is VersionKind.BASE else str(root / parent.path),
        parent_kind=parent.kind,
        parent_version=parent.number,
        snapshot_dir=str(root / dataset.path),
        **_settings(config),
    )


def _settings(config: Config) -> dict[str, Any]:
    policy = config.policy
    return {
        "method": policy.method,
        "lora_rank": policy.lora_rank,
        "lora_alpha": policy.lora_alpha,
        "lora_targets": policy.lora_targets,
        "dtype": policy.dtype,
        "quantization": policy.quantization,
        "device": policy.device,
        "max_context": config.serve.max_context,
        "train": config.train,
    }


def _base_settings() -> dict[str, Any]:
    return {"parent_path": None, "parent_kind": VersionKind.BASE, "parent_version": 0}


class _Listener:
    """Hears the child's metrics rows."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress

    def hear(self, rows: Sequence[Row]) -> None:
        for row in rows if self._on_progress else ():
            assert self._on_progress is not None
            self._on_progress(row)

    def flush(self) -> None:
        """Nothing more comes from this child."""


class _Heart(_Listener):
    """Copies the last row into the run row, and renews the run's lease, about once a second.

    A store that cannot write just now (another process holds its lock) does not stop the training: what must not be lost is
    written at the end, and a run that another process took over is a ConflictError.
    """

    def __init__(self, store: Store, row: Run, lease_s: float, on_progress: OnProgress | None) -> None:
        super().__init__(on_progress)
        self._store, self._row, self._lease_s = store, row, lease_s
        self._progress: dict[str, Any] = {**row.progress, "folder": row.progress.get("folder", row.run_id)}
        self._beat_at = datetime.min.replace(tzinfo=UTC)

    def hear(self, rows: Sequence[Row]) -> None:
        super().hear(rows)
        for row in rows:
            self._progress |= row
        if (datetime.now(UTC) - self._beat_at).total_seconds() >= HEARTBEAT_S:
            self.flush()

    def flush(self) -> None:
        self._beat_at = now = datetime.now(UTC)
        until, progress = now + timedelta(seconds=self._lease_s), dict(self._progress)
        try:
            self._store.write(
                lambda c: runs.heartbeat(
                    c, self._row.run_id, owner=self._row.owner, at=now, lease_expires_at=until, progress=progress
                )
            )
        except StoreError as error:
            LOG.warning("run %s: the heartbeat could not be written: %s", self._row.run_id, error)


def _attempts(job: TrainJob, folder: Path, listener: _Listener, should_stop: Callable[[], bool]) -> TrainResult | None:
    """Start children until one leaves a result; None where ``should_stop`` said so.

    A child that dies without a result (killed, crashed) is started again and goes on from its last checkpoint, as long as that
    gets it further.
    """
    result_path, checkpoints = Path(job.result_path), Path(job.checkpoint_dir)
    job.save(folder / "job.json")
    reached, attempt = _reached(checkpoints), 0
    while True:
        found = TrainResult.load(result_path)
        if found is not None and found.status is TrainStatus.SUCCEEDED and Path(job.out_dir).is_dir():
            return found
        # Of a run on a cluster the workers may have outlived the process that asked for them; then their files stay.
        if not is_held(checkpoints / LOCK):
            result_path.unlink(missing_ok=True)
            rewind_metrics(Path(job.metrics_path), _reached(checkpoints))
        attempt += 1
        with started(folder / "job.json", log_path=folder / "child.log", threads=job.train.threads) as child:
            code = follow(child, Path(job.metrics_path), listener.hear, should_stop)
        listener.flush()
        if code is None:
            return None
        found = TrainResult.load(result_path)
        if found is not None:
            return found
        if _reached(checkpoints) > reached:
            reached, attempt = _reached(checkpoints), 0
        LOG.warning("the training process ended with code %s at step %s, attempt %s", code, reached, attempt)
        if attempt >= MAX_ATTEMPTS:
            return TrainResult(TrainStatus.FAILED, error=_died(code, folder))


def _reached(checkpoints: Path) -> int:
    found = last_checkpoint(checkpoints)
    return 0 if found is None else found[0]


def _died(code: int, folder: Path) -> TrainError:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    hint = " (the system does that where memory runs out: set train.max_tokens_per_batch lower)" if code == -9 else ""
    log = log_tail(folder / "child.log")
    text = f"the training process {how} {MAX_ATTEMPTS} times in a row without a result{hint}"
    return TrainError("child_died", "system_error", f"{text}; its last words:\n{log}" if log else text)


def _register(store: Store, row: Run, job: TrainJob, result: TrainResult) -> Version | None:
    """Publish the folder, then insert the version and end the run in one transaction."""
    now = datetime.now(UTC)
    if result.status is not TrainStatus.SUCCEEDED:
        message = result.error.message if result.error else None
        store.write(lambda c: runs.end(c, row.run_id, _status(result), result.as_dict(), message, now))
        return None
    artifact = store.artifacts.publish(Path(job.out_dir), _manifest(row, job, result))

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


def _refuse_occupied(out: Path, folder: Path, *, resume: bool) -> None:
    """UserError where writing ``out`` would overwrite something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; name a new folder for the trained model")
    if folder.exists() and not resume:
        raise UserError(f"{out}: an earlier run was interrupted; go on with it (resume), or remove {folder}")


def _raise(error: TrainError, folder: Path) -> None:
    """The child's error as an exception; the folder stays where another attempt can go on with it."""
    if error.kind == "system_error":
        raise TrainingError(f"{error.message}; `resume` goes on with {folder}")
    if error.code != "checkpoint_mismatch":
        shutil.rmtree(folder)
    raise UserError(error.message)


def _deliver(job: TrainJob, folder: Path, out: Path) -> None:
    """Move the finished folder to ``out``, with metrics and result inside, in one rename."""
    finished = Path(job.out_dir)
    (finished / "training").mkdir(exist_ok=True)
    for path in (Path(job.metrics_path), Path(job.result_path)):
        shutil.copyfile(path, finished / "training" / path.name)
    if out.exists():
        out.rmdir()
    finished.rename(out)
    shutil.rmtree(folder)
