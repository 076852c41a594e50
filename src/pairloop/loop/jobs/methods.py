"""From a job's method to a training section: which objective, and what "auto" comes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.config import Config, TrainSection
from pairloop.errors import InvalidRequestError
from pairloop.loop import train
from pairloop.loop.jobs.request import JobRequest
from pairloop.store.jobs import Job

AUTO = "auto"
GROUP_SIZE = 8
"""Answers sampled per prompt for a verifier, where the job does not say."""
_OBJECTIVES = {"supervised": "sft", "reinforcement": "grpo"}


def objective_of(method: Mapping[str, Any]) -> str:
    """The objective's name in ``train.objective``."""
    kind: str = method["type"]
    return _OBJECTIVES.get(kind, kind)


def verifier_of(method: Mapping[str, Any]) -> str | None:
    """The verifier that scores sampled answers; None where the rows say it all."""
    options = method[method["type"]]
    verifier: str | None = options.get("verifier") or options.get("grader", {}).get("name")
    return verifier


def group_size_of(method: Mapping[str, Any]) -> int:
    """Answers sampled per prompt, where a verifier scores them."""
    size = method[method["type"]]["hyperparameters"].get("group_size", AUTO)
    return GROUP_SIZE if size == AUTO else int(size)


def as_asked(request: JobRequest, config: Config) -> dict[str, Any]:
    """The method as the job's body shows it until its files are validated: "auto" where nothing was said.

    InvalidRequestError where a verifier is named that is not the configured one, or numbers do not go together.
    """
    _check_verifier(request, config)
    options = request.options.model_dump(exclude_none=True)
    given = request.options.hyperparameters.model_dump()
    hyperparameters = {name: AUTO if value is None else value for name, value in given.items()}
    if request.verifier is None and hyperparameters.pop("group_size", AUTO) != AUTO:
        raise InvalidRequestError(
            "group_size says how many answers are sampled for a verifier; name one, or leave it out",
            param=f"method.{request.type}.hyperparameters.group_size",
        )
    method = {"type": request.type, request.type: {**options, "hyperparameters": hyperparameters}}
    _settings(method, config)
    return method


def resolved(method: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The method with each "auto" replaced by what the configuration says."""
    kind = method["type"]
    numbers = _settings(method, config)[1]
    if verifier_of(method) is not None:
        numbers["group_size"] = group_size_of(method)
    return {**method, kind: {**method[kind], "hyperparameters": numbers}}


def train_section(job: Job, config: Config) -> TrainSection:
    """How a job is trained: the configured section with the job's objective, numbers and seed."""
    return _settings(job.method, config, seed=job.seed)[0]


def _settings(method: Mapping[str, Any], config: Config, *, seed: int | None = None) -> tuple[TrainSection, dict[str, Any]]:
    kind = method["type"]
    numbers = {name: value for name, value in method[kind]["hyperparameters"].items() if name != "group_size"}
    return train.train_settings(objective_of(method), numbers, config, seed=seed, param=f"method.{kind}.hyperparameters")


def _check_verifier(request: JobRequest, config: Config) -> None:
    if request.verifier is None:
        return
    named, param = request.verifier
    if named != config.label.verifier:
        known = f"it is {config.label.verifier!r}" if config.label.verifier else "there is none: set label.verifier"
        raise InvalidRequestError(f"{named!r} is not the configured verifier; {known}", param=param)
