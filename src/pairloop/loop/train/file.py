"""A training on rows in memory: neither store nor server, one folder out."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from pairloop.config import Config
from pairloop.errors import TrainingError, UserError
from pairloop.formats import snapshot
from pairloop.learner.job import FAKE, TrainError, TrainResult, TrainStatus
from pairloop.loop.train.attempts import OnProgress, Start, run_in
from pairloop.policy.engine import resolve_model
from pairloop.types import TrainingRow


def train_file(
    rows: Sequence[TrainingRow],
    model: str,
    out: Path,
    config: Config | None = None,
    *,
    heldout: Sequence[TrainingRow] = (),
    resume: bool = False,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Train ``model`` (a directory, a hub id, or ``starter``) on ``rows`` in a child process, and write ``out``.

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
    base = model if model == FAKE else str(resolve_model(model))
    data = folder / "data"
    snapshot.write_folder(data, rows, heldout)
    run_id = f"train_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    result = run_in(folder, config, start=Start(base), data=data, run_id=run_id, on_progress=on_progress)
    if result.status is TrainStatus.SUCCEEDED:
        _deliver(folder, out)
    elif result.error is None:
        shutil.rmtree(folder)
    else:
        _raise(result.error, folder)
    return result


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


def _deliver(folder: Path, out: Path) -> None:
    """Move the finished folder to ``out``, with metrics and result inside, in one rename."""
    finished = folder / "out"
    (finished / "training").mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "result.json"):
        shutil.copyfile(folder / name, finished / "training" / name)
    if out.exists():
        out.rmdir()
    finished.rename(out)
    shutil.rmtree(folder)
