"""A training in a folder: children are started until one leaves a result, and heard as long as they run."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairloop.config import Config, TrainSection
from pairloop.errors import ConfigError
from pairloop.learner.child import Row, follow, log_tail, read_rows, started
from pairloop.learner.files import is_held
from pairloop.learner.job import (
    DISK_FULL,
    ERROR_CODES,
    FAKE,
    LOCK,
    TrainError,
    TrainJob,
    TrainResult,
    TrainStatus,
    last_checkpoint,
    rewind_metrics,
)
from pairloop.loop.train.elsewhere import Shared, attempt_shared
from pairloop.policy.engine import resolve_model
from pairloop.policy.protocols import Fetch
from pairloop.types import BASE_VERSION, Version, VersionKind

LOG = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Starts of a child in a row that reach no new checkpoint, before the run is given up."""


OnProgress = Callable[[Row], None]
OnCheckpoint = Callable[[int, Path, Row], None]
"""Told of a model that is kept: after which step, its folder (ready to be served), and its figures (see `figures_of`)."""
ShouldStop = Callable[[], bool]
"""Asked several times a second while a child runs, so a heartbeat may live here too; True pauses, to go on later."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a training starts from: ``model`` as it is, or one of its versions.

    ``model``: ``fake``, ``starter``, a directory or a hub id. ``path``: the version's folder, of ``kind`` FULL or ADAPTER.
    ``number``: whose recorded log-probs are the reference's; rows that were not sampled have none.
    """

    model: str
    path: Path | None = None
    kind: VersionKind = VersionKind.BASE
    number: int = BASE_VERSION

    @classmethod
    def of(cls, model: str, parent: Version, fetch: Fetch) -> Start:
        """From a version of ``model``, whose folder ``fetch`` brings here."""
        is_base = parent.kind is VersionKind.BASE
        return cls(model, None if is_base else fetch(parent.path), parent.kind, parent.number)


def run_in(
    folder: Path,
    config: Config,
    *,
    start: Start,
    data: Path,
    train: TrainSection | None = None,
    run_id: str | None = None,
    keep_epochs: bool = False,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    should_stop: ShouldStop = lambda: False,
    shared: Shared | None = None,
) -> TrainResult:
    """Train ``start`` on the snapshot folder ``data``, and leave the model in ``folder / "out"``.

    Called again with the same arguments it takes up what was interrupted (by a pause, kill -9, or the machine), from the last
    checkpoint on and to the same bits, and returns the result where there is one already. ``train`` takes the place of
    ``config.train``; ``run_id`` names the run on a cluster, by default by the folder.

    ``keep_epochs`` keeps the model after each epoch in ``folder / "epochs"``, of which ``on_checkpoint`` is told. What
    ``on_progress`` and ``on_checkpoint`` are told may come again after an interruption, under the same step. ``shared``: where
    other machines find the run's newest checkpoint, and this one theirs.

    Status PAUSED: ``should_stop`` said so, and the folder is to be kept. FAILED: ``error`` has a code of
    `pairloop.learner.job.ERROR_CODES`. Raises ConfigError where method and parent do not go together, ModelError where the
    model is not there.
    """
    job = job_in(folder, config, start=start, data=data, train=train or config.train, run_id=run_id, keep_epochs=keep_epochs)

    def work() -> TrainResult:
        return attempt(job, folder.resolve(), Listener(on_progress, on_checkpoint), should_stop)

    return work() if shared is None else attempt_shared(shared, job, work)


def job_in(
    folder: Path,
    config: Config,
    *,
    start: Start,
    data: Path,
    train: TrainSection,
    run_id: str | None = None,
    keep_epochs: bool = False,
) -> TrainJob:
    """The child's orders, in a folder that is made where it is missing; see `run_in`."""
    _refuse_method(config, start)
    base_dir = start.model if start.model == FAKE else str(resolve_model(start.model).resolve())
    folder.mkdir(parents=True, exist_ok=True)
    return TrainJob.in_folder(
        folder,
        keep_epochs=keep_epochs,
        run_id=run_id or folder.resolve().name,
        base_dir=base_dir,
        parent_path=None if start.path is None else str(start.path),
        parent_kind=start.kind,
        parent_version=start.number,
        snapshot_dir=str(data.resolve()),
        **_settings(config, train),
    )


def figures_of(row: Row) -> dict[str, float]:
    """What a metrics row says, in the words of a fine-tuning job; what is not defined for its data is left out.

    Of a step: ``train_loss``, ``train_accuracy``, ``rewards_chosen``, ``rewards_rejected``, ``rewards_margin``,
    ``learning_rate``, ``tokens``; of a look at the held-out rows or the end of an epoch: ``valid_loss``, ``valid_accuracy``.
    Accuracies and margins are those of the groups that have a better and a worse answer. Always ``step`` and ``of``.
    """
    place = {"step": row["step"], "of": row["of"]}
    if "epoch" in row or "heldout" in row:
        found = row["epoch"]["heldout"] if "epoch" in row else row["heldout"]
        figures = {"valid_loss": found.get("loss"), "valid_accuracy": _of_compared(found, "accuracy")}
    else:
        figures = {
            "train_loss": row.get("loss"),
            "train_accuracy": _of_compared(row, "accuracy"),
            "rewards_chosen": row.get("reward_chosen"),
            "rewards_rejected": row.get("reward_rejected"),
            "rewards_margin": _of_compared(row, "margin"),
            "learning_rate": row.get("lr"),
            "tokens": row.get("tokens"),
        }
    return place | {name: value for name, value in figures.items() if value is not None}


class Listener:
    """Hears the child's metrics rows."""

    def __init__(self, on_progress: OnProgress | None = None, on_checkpoint: OnCheckpoint | None = None) -> None:
        self._on_progress, self._on_checkpoint = on_progress, on_checkpoint
        self._last: Row = {}

    def hear(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._on_progress is not None:
                self._on_progress(row)
            if "epoch" in row:
                self._tell(row)
            elif "heldout" not in row:
                self._last = row

    def flush(self) -> None:
        """Nothing more comes from this child."""

    def _tell(self, row: Row) -> None:
        if self._on_checkpoint is None:
            return
        kept = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
        figures = (figures_of(self._last) if self._last else {}) | figures_of(row)
        self._on_checkpoint(row["step"], Path(row["epoch"]["folder"]), {k: v for k, v in figures.items() if k in kept})


def attempt(job: TrainJob, folder: Path, listener: Listener, should_stop: ShouldStop) -> TrainResult:
    """Start children until one leaves a result, or ``should_stop`` says so.

    A child that dies without a result (killed, crashed) is started again and goes on from its last checkpoint, as long as that
    gets it further.
    """
    result_path, metrics_path, checkpoints = Path(job.result_path), Path(job.metrics_path), Path(job.checkpoint_dir)
    job.save(folder / "job.json")
    reached, attempts = _reached(checkpoints), 0
    while True:
        found = TrainResult.load(result_path)
        if found is not None and found.status is TrainStatus.SUCCEEDED and Path(job.out_dir).is_dir():
            listener.hear(read_rows(metrics_path)[0])
            return found
        # Of a run on a cluster the workers may have outlived the process that asked for them; then their files stay.
        if not is_held(checkpoints / LOCK):
            result_path.unlink(missing_ok=True)
            rewind_metrics(metrics_path, _reached(checkpoints))
        attempts += 1
        with started(folder / "job.json", log_path=folder / "child.log", threads=job.train.threads) as child:
            code = follow(child, metrics_path, listener.hear, should_stop)
        listener.flush()
        if code is None:
            return _paused(job)
        found = TrainResult.load(result_path)
        if found is not None:
            return found
        if _reached(checkpoints) > reached:
            reached, attempts = _reached(checkpoints), 0
        LOG.warning("the training process ended with code %s at step %s, attempt %s", code, reached, attempts)
        if should_stop():  # another worker took the run over meanwhile, say, and its folder is theirs
            return _paused(job)
        if attempts >= MAX_ATTEMPTS:
            return TrainResult(TrainStatus.FAILED, error=_died(code, folder))


def _paused(job: TrainJob) -> TrainResult:
    """How far the run came."""
    steps = [row for row in read_rows(Path(job.metrics_path))[0] if "tokens" in row]
    last: Row = steps[-1] if steps else {"step": 0, "of": 0}
    return TrainResult(
        TrainStatus.PAUSED,
        steps=last["step"],
        steps_planned=last["of"],
        trained_tokens=sum(row["tokens"] for row in steps),
    )


def _refuse_method(config: Config, start: Start) -> None:
    wrong = {"full": VersionKind.ADAPTER, "lora": VersionKind.FULL}[config.policy.method]
    if start.kind is wrong:
        raise ConfigError(
            f'policy.method = "{config.policy.method}", but the parent ({start.path}) is of kind {wrong.value}: a policy keeps '
            "its method; set the old one, or start a new policy (another policy.name) from a merged model"
        )


def _settings(config: Config, train: TrainSection) -> dict[str, Any]:
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
        "train": train,
    }


def _reached(checkpoints: Path) -> int:
    found = last_checkpoint(checkpoints)
    return 0 if found is None else found[0]


def _died(code: int, folder: Path) -> TrainError:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    hint = " (the system does that where memory runs out: set train.max_tokens_per_batch lower)" if code == -9 else ""
    log = log_tail(folder / "child.log")
    if os.strerror(errno.ENOSPC) in log:  # it could not even write down how it ended
        return TrainError(DISK_FULL, ERROR_CODES[DISK_FULL], f"the disk is full; the training process's last words:\n{log}")
    text = f"the training process {how} {MAX_ATTEMPTS} times in a row without a result{hint}"
    return TrainError("child_died", "system_error", f"{text}; its last words:\n{log}" if log else text)


def _of_compared(found: Row, name: str) -> float | None:
    """The figure of the groups that have a better and a worse answer; it is a sum over all of them."""
    value, usable = found.get(name), found.get("usable", 1.0)
    return None if value is None or not usable else value / usable
