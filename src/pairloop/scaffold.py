"""Writes the commented ``pairloop.toml`` of ``pairloop init``, from the configuration's own fields."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pairloop.config import CONFIG_FILE, Config, Section, parse_config
from pairloop.errors import ConflictError


def starter_recipe() -> dict[str, dict[str, Any]]:
    """The settings that fit the embedded model (``starter/recipe.toml``)."""
    return tomllib.loads(files("pairloop.starter").joinpath("recipe.toml").read_text(encoding="utf-8"))


def write_config(directory: Path, settings: Mapping[str, Mapping[str, Any]], *, force: bool = False) -> Path:
    """Writes ``directory/pairloop.toml`` with ``settings`` set and every other key commented at its default.

    Refuses settings that the configuration refuses, and an existing file unless ``force``.
    """
    parse_config(settings, origin="settings")
    path = directory / CONFIG_FILE
    if path.exists() and not force:
        raise ConflictError(f"{path} exists; --force writes it anew (the data beside it stays)")
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(render_config(settings), encoding="utf-8")
    return path


def render_config(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The TOML text: what is set stands as it is, what is not stands as a comment with its default."""
    parts = ["# pairloop configuration. Keys that are commented out show their defaults; docs/config.md explains each."]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            continue
        parts.append("")
        if section.__doc__:
            parts.append(f"# {section.__doc__.splitlines()[0]}")
        parts.append(f"[{name}]")
        parts.extend(_render_keys(section, settings.get(name, {})))
    return "\n".join(parts) + "\n"


def _render_keys(section: type[Section], values: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for key, field in section.model_fields.items():
        if field.description:
            lines.extend(f"# {line}" for line in field.description.splitlines())
        if key in values:
            lines.append(f"{key} = {toml_value(values[key])}")
        else:
            lines.append(f"# {key} = {'' if field.default is None else toml_value(field.default)}".rstrip())
    return lines


def toml_value(value: Any) -> str:
    """A value as TOML writes it; JSON's scalars, strings and arrays are TOML's too."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{{inner}}}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
