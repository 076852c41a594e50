"""Weights & Biases. Its key comes from WANDB_API_KEY, or from `wandb login`; WANDB_MODE=offline keeps everything on disk."""

from __future__ import annotations

from collections.abc import Mapping

import wandb

from pairloop.config import Config
from pairloop.track.files import tracking_folder
from pairloop.track.run import Outcome, RunInfo


class WandbTracker:
    """Figures and settings only: neither code, nor the machine's state, nor what is printed."""

    def __init__(self, config: Config) -> None:
        self._folder = tracking_folder(config)
        self._settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._run: wandb.Run | None = None

    def open(self, run: RunInfo) -> int:
        self._run = wandb.init(
            project=run.project,
            id=run.key,
            name=run.name,
            config=dict(run.settings),
            dir=self._folder,
            resume="allow",
            reinit="create_new",
            settings=self._settings,
        )
        return self._run.step

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._opened.log(dict(values), step=step)

    def figures(self, number: int, values: Mapping[str, float]) -> None:
        self._opened.summary.update({**values, "cycle": number})

    def notes(self, values: Mapping[str, str]) -> None:
        self._opened.summary.update(dict(values))

    def close(self, outcome: Outcome) -> None:
        self._opened.finish(exit_code=0 if outcome == "finished" else 1)

    @property
    def _opened(self) -> wandb.Run:
        assert self._run is not None, "opened before anything is told"
        return self._run
