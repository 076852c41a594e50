"""What a fine-tuning job's method and hyperparameters mean as training settings; the same for the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from pairloop.config import Config, TrainSection
from pairloop.config.train import OPTIONS, READ_BY, ObjectiveName
from pairloop.errors import ConfigError, InvalidRequestError

AUTO = "auto"
SUPERVISED = ("supervised", "sft")
"""OpenAI's name and ours for training on demonstrations."""
MAX_BETA, MAX_BATCH_SIZE, MAX_EPOCHS = 2.0, 256, 50


def train_settings(
    method: str, hyperparameters: Mapping[str, Any], config: Config, *, seed: int | None = None, param: str | None = None
) -> tuple[TrainSection, dict[str, Any]]:
    """The training section of a job, and its hyperparameters with each ``auto`` resolved.

    ``method``: ``supervised`` (or ``sft``), ``dpo``, or another objective by name. Hyperparameters: ``beta`` in (0, 2], but not
    of supervised training; ``batch_size`` 1..256; ``learning_rate_multiplier`` above 0, of ``config.train.learning_rate``;
    ``n_epochs`` 1..50; and the options of `TrainSection` that the objective reads. What is absent or ``auto`` is as
    ``config.train`` has it; options that the objective does not read are left out. Raises InvalidRequestError for ``param``
    (by default ``method.<method>.hyperparameters``) and the key.
    """
    objective = "sft" if method in SUPERVISED else method
    if objective not in get_args(ObjectiveName):
        names = ", ".join(("supervised", *(name for name in get_args(ObjectiveName) if name != "sft")))
        raise InvalidRequestError(f"unknown method {method!r}; known are {names}", param="method.type")
    place = param or f"method.{method}.hyperparameters"
    options = READ_BY.get(objective, set())
    given = _given(method, hyperparameters, options | ({"beta"} if objective != "sft" else set()), place)
    base = with_objective(config.train, objective)
    resolved: dict[str, Any] = {
        "batch_size": _whole(given, "batch_size", MAX_BATCH_SIZE, place, base.batch_size),
        "learning_rate_multiplier": _number(given, "learning_rate_multiplier", math.inf, place, 1.0),
        "n_epochs": _whole(given, "n_epochs", MAX_EPOCHS, place, base.epochs),
    }
    if objective != "sft":
        resolved["beta"] = _number(given, "beta", MAX_BETA, place, base.beta)
    resolved |= {key: given[key] for key in sorted(given.keys() & options)}
    changes = {key: value for key, value in resolved.items() if key not in ("learning_rate_multiplier", "n_epochs")}
    changes |= {
        "learning_rate": base.learning_rate * resolved["learning_rate_multiplier"],
        "epochs": resolved["n_epochs"],
        "seed": base.seed if seed is None else seed,
    }
    return _section({**base.model_dump(), **changes}, place), resolved


def _given(method: str, hyperparameters: Mapping[str, Any], own: set[str], place: str) -> dict[str, Any]:
    """What is given and not ``auto``; InvalidRequestError for a key that is neither of all methods nor in ``own``."""
    known = {"batch_size", "learning_rate_multiplier", "n_epochs", *own}
    for key in hyperparameters:
        if key not in known:
            raise InvalidRequestError(
                f"{method} has no hyperparameter {key!r}; it has {', '.join(sorted(known))}", param=f"{place}.{key}"
            )
    return {key: value for key, value in hyperparameters.items() if value not in (AUTO, None)}


def with_objective(section: TrainSection, objective: str) -> TrainSection:
    """The section with this objective, and without the options that it does not read; ConfigError where there is none such."""
    if objective not in get_args(ObjectiveName):
        raise ConfigError(f"train.objective: there is no {objective!r}; known are {', '.join(get_args(ObjectiveName))}")
    unread = OPTIONS - READ_BY.get(objective, OPTIONS)
    if "label_smoothing" in unread:
        unread |= {"measured_smoothing"}
    kept = {key: value for key, value in section.model_dump().items() if key not in unread}
    return TrainSection.model_validate({**kept, "objective": objective})


def _section(data: Mapping[str, Any], place: str) -> TrainSection:
    try:
        return TrainSection.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(f"{key or 'hyperparameters'}: {first['msg']}", param=f"{place}.{key}".rstrip(".")) from error


def _whole(given: Mapping[str, Any], key: str, highest: int, place: str, default: int) -> int:
    value = given.get(key, default)
    if isinstance(value, int) and not isinstance(value, bool) and (1 <= value <= highest or key not in given):
        return value
    raise InvalidRequestError(f"{key} must be a whole number from 1 to {highest}, found {value!r}", param=f"{place}.{key}")


def _number(given: Mapping[str, Any], key: str, highest: float, place: str, default: float) -> float:
    value = given.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (0 < value <= highest or key not in given):
        return float(value)
    limit = f" and at most {highest:g}" if math.isfinite(highest) else ""
    raise InvalidRequestError(f"{key} must be a number above 0{limit}, found {value!r}", param=f"{place}.{key}")
