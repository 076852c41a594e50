"""What trackers are told of a run, and what a tracker is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pairloop.config import Config

Outcome = Literal["finished", "failed", "stopped"]
"""``stopped``: it will go on later, as the same run."""

Setting = str | int | float | bool


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One run as trackers know it. ``key``: the same for all that is ever told of it, from whatever process."""

    key: str
    name: str
    project: str
    settings: Mapping[str, Setting] = field(default_factory=dict)


class Tracker(Protocol):
    """One tracking service, spoken to from one thread; anything it raises ends its part in the run."""

    def open(self, run: RunInfo) -> int:
        """Begin the run, or go on with the one of the same key; the last training step that it knows, 0 of a new one."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a training step; steps never fall."""

    def figures(self, number: int, values: Mapping[str, float]) -> None:
        """Figures of the run as a whole; ``number``: of its cycle, or 0."""

    def notes(self, values: Mapping[str, str]) -> None:
        """Words about the run as a whole, such as the version it made."""

    def close(self, outcome: Outcome) -> None:
        """Nothing more comes from this process."""


def training_info(config: Config, *, key: str, name: str, **facts: Setting | None) -> RunInfo:
    """A training run: its objective's settings and the model's, and ``facts`` such as the dataset, as far as they are known."""
    policy = config.policy
    model = policy.model_dump(include={"model", "method", "dtype", "quantization", "lora_rank", "lora_alpha"})
    train = config.train.model_dump(mode="json", exclude={"ray_address"})
    settings = {f"policy.{key}": value for key, value in model.items()} | {
        f"train.{key}": value for key, value in train.items()
    }
    known = {**facts, **settings}
    plain = {key: _plain(value) for key, value in known.items() if value is not None}
    return RunInfo(key, name, config.track.project or policy.name, plain)


def numbers(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``values`` under ``prefix/name``."""
    return {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _plain(value: Any) -> Setting:
    return value if isinstance(value, str | int | float | bool) else str(value)
