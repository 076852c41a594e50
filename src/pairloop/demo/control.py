"""The chosen-only control: fine-tuning on the picked answers, with the same data and the same budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairloop.config import Config, override
from pairloop.formats import snapshot
from pairloop.loop.train import train_file

if TYPE_CHECKING:
    from pairloop.demo.run import Watcher


def train_control(config: Config, datasets: Sequence[Path], out: Path, watcher: Watcher) -> Path | None:
    """Trains the base on each promoted dataset in turn, as the champion was, on the chosen answers alone.

    Returns the last model's folder, or None (the base itself) where nothing was promoted.
    """
    settings = override(config, {"train": {"objective": "sft"}})
    model: Path | None = None
    for number, dataset in enumerate(datasets, start=1):
        target = out / "control" / str(number)
        train_file(
            list(snapshot.read(dataset / snapshot.TRAIN_FILE)),
            config.policy.model if model is None else str(model),
            target,
            settings,
            on_progress=_bar(watcher, f"control: the chosen answers of dataset {number} of {len(datasets)}"),
        )
        model = target
    return model


def _bar(watcher: Watcher, text: str) -> Callable[[Mapping[str, Any]], None]:
    return lambda row: watcher.bar(text, int(row["step"]), int(row["of"]))
