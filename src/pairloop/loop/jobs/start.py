"""Where a job starts from: the model that its client named, as a version of this server's policy or of a lineage of its own."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from pairloop.config import Config, override
from pairloop.errors import ModelError, NotFoundError
from pairloop.policy.engine import FAKE_MODEL, STARTER_MODEL, resolve_model
from pairloop.store import versions
from pairloop.types import BASE_VERSION, Alias, Version

FT = "ft:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Start:
    """A version by its policy and number; ``base_model`` where that policy is not this server's own."""

    policy: str
    number: int
    base_model: str | None = None


def find_start(c: Connection, config: Config, model: str) -> Start:
    """What ``model`` names: a bare policy name (its champion), ``name@version``, ``ft:...``, a model directory, or a hub id.

    A hub id is fetched later, while the job's files are validated. NotFoundError (param ``model``) where nothing is called so.
    """
    own = config.policy.name
    if model.startswith(FT):
        version = versions.by_model_name(c, model)
        if version is None:
            raise _unknown(model)
        return _start_of(c, config, version)
    name, _, selector = model.partition("@")
    if name == own:
        return Start(own, _numbered(c, own, model, selector or str(Alias.CHAMPION)))
    if _is_own_base(config, model):
        return Start(own, BASE_VERSION)
    if model not in (FAKE_MODEL, STARTER_MODEL) and not _HUB_ID.fullmatch(model):
        _check_directory(model)
    return Start(lineage_name(model), BASE_VERSION, model)


def lineage_config(config: Config, policy: str, base_model: str | None) -> Config:
    """The configuration under which a job of this lineage is trained."""
    return config if base_model is None else override(config, {"policy": {"name": policy, "model": base_model}})


def lineage_name(model: str) -> str:
    """The policy name of the versions that are trained from another base model than this server's."""
    path = Path(model).expanduser()
    model = str(path.resolve()) if path.is_dir() else model
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-._")[:48] or "model"
    return f"{stem}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _start_of(c: Connection, config: Config, version: Version) -> Start:
    if version.policy == config.policy.name:
        return Start(version.policy, version.number)
    base = versions.get(c, version.policy, BASE_VERSION)
    assert base is not None, "a lineage begins with its base"
    return Start(version.policy, version.number, base.path)


def _numbered(c: Connection, policy: str, model: str, selector: str) -> int:
    if selector == "base":
        return BASE_VERSION
    number = versions.alias(c, policy, Alias(selector)) if selector in set(Alias) else None
    if number is None and selector.isascii() and selector.isdigit() and len(selector) <= 9:
        number = int(selector)
    if number is None or versions.get(c, policy, number) is None:
        raise _unknown(model)
    return number


def _is_own_base(config: Config, model: str) -> bool:
    own = config.policy.model
    if model == own:
        return True
    path = Path(model).expanduser()
    return path.is_dir() and own not in (FAKE_MODEL, STARTER_MODEL) and path.resolve() == Path(own).expanduser().resolve()


def _check_directory(model: str) -> None:
    if not Path(model).expanduser().exists():
        raise _unknown(model)
    try:
        resolve_model(model)
    except ModelError as error:
        raise NotFoundError(f"the model {model!r} cannot be trained: {error}", param="model") from error


def _unknown(model: str) -> NotFoundError:
    return NotFoundError(
        f"the model {model!r} does not exist: neither GET /v1/models lists it, nor is it a model directory on this server, nor "
        "a hub id such as org/name",
        param="model",
    )
