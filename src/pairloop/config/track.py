"""The trackers that hear of training runs and cycles."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, Self

from pydantic import model_validator

from pairloop.config.section import Section

TrackerName = Literal["mlflow", "wandb", "tensorboard"]


class TrackSection(Section):
    """Who else hears of training runs and cycles: figures and settings only, never a message."""

    to: tuple[TrackerName, ...] = ()
    """``mlflow``, ``wandb`` and ``tensorboard``, any of them; each needs the extra of its name. Keys and passwords are not for
    this file: each tracker reads its own environment variables."""
    project: str | None = None
    """The MLflow experiment, the Weights & Biases project; by default the policy's name."""
    mlflow_uri: str | None = None
    """MLflow's server or database; by default that of ``MLFLOW_TRACKING_URI``, else ``mlflow.sqlite`` in the state
    directory."""
    folder: str | None = None
    """Where TensorBoard's and Weights & Biases' files lie; by default ``tracking`` in the state directory."""

    @model_validator(mode="after")
    def _trackers_are_there(self) -> Self:
        missing = [name for name in self.to if find_spec(name) is None]
        if missing:
            raise ValueError(
                f'to: {missing[0]} is not installed: pip install "pairloop[{missing[0]}]", or take it out of the list'
            )
        if len(set(self.to)) < len(self.to):
            raise ValueError("to: names a tracker twice")
        if self.mlflow_uri is not None and "mlflow" not in self.to:
            raise ValueError('mlflow_uri is read by mlflow alone: add "mlflow" to the list in to, or leave it out')
        return self
