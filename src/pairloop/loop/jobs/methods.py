"""From a job's method to a training section: which objective, and what "auto" comes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.config import Config, TrainSection, override
from pairloop.config.train import OPTIONS, READ_BY
from pairloop.errors import InvalidRequestError
from pairloop.loop.jobs.request import JobRequest
from pairloop.store.jobs import Job

GROUP_SIZE = 8
"""Answers sampled per prompt for a verifier, where the job does not say."""
_OBJECTIVES = {"supervised": "sft", "reinforcement": "grpo"}


def objective_of(method: Mapping[str, Any]) -> str:
    """The objective's name in ``train.objective``."""
    return _OBJECTIVES.get(method["type"], method["type"])


def verifier_of(method: Mapping[str, Any]) -> str | None:
    """The verifier that scores sampled answers; None where the rows say it all."""
    options = method[method["type"]]
    verifier: str | None = options.get("verifier") or options.get("grader", {}).get("name")
    return verifier


def as_asked(request: JobRequest, config: Config) -> dict[str, Any]:
    """The method as the job's body shows it until its files are validated: "auto" where nothing was said.

    InvalidRequestError where a verifier is named that is not the configured one.
    """
    if request.verifier is not None:
        named, param = request.verifier
        if named != config.label.verifier:
            known = f"it is {config.label.verifier!r}" if config.label.verifier else "there is none: set label.verifier"
            raise InvalidRequestError(f"{named!r} is not the configured verifier; {known}", param=param)
    options = request.options.model_dump(exclude_none=True)
    hyperparameters = {
        name: "auto" if value is None else value for name, value in request.options.hyperparameters.model_dump().items()
    }
    if request.verifier is None:
        hyperparameters.pop("group_size", None)
    return {"type": request.type, request.type: {**options, "hyperparameters": hyperparameters}}


def resolved(method: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The method with each "auto" replaced by what the configuration says."""
    kind = method["type"]
    train = config.train
    auto = {
        "batch_size": train.batch_size,
        "n_epochs": train.epochs,
        "learning_rate_multiplier": 1.0,
        "beta": train.beta,
        "group_size": GROUP_SIZE,
    }
    given = method[kind]["hyperparameters"]
    numbers = {name: auto[name] if value == "auto" else value for name, value in given.items()}
    return {**method, kind: {**method[kind], "hyperparameters": numbers}}


def train_section(job: Job, config: Config) -> TrainSection:
    """How a job is trained: the configured section with the job's objective, numbers and seed.

    Options that its objective does not read go back to their defaults.
    """
    objective = objective_of(job.method)
    numbers = resolved(job.method, config)[job.method["type"]]["hyperparameters"]
    defaults = TrainSection()
    unread = OPTIONS - READ_BY.get(objective, OPTIONS)
    changes: dict[str, Any] = {name: getattr(defaults, name) for name in unread}
    changes |= {
        "objective": objective,
        "batch_size": numbers["batch_size"],
        "epochs": numbers["n_epochs"],
        "learning_rate": config.train.learning_rate * numbers["learning_rate_multiplier"],
        "beta": numbers.get("beta", config.train.beta),
        "seed": job.seed,
    }
    return override(config, {"train": changes}).train
