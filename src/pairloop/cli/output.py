"""How verbs speak: text for people, one JSON document on stdout with ``--json``, errors on stderr with an exit code."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from pairloop.errors import PairloopError, RowsError, SystemFailure, UserError

EXIT_USER_ERROR = 2
EXIT_SYSTEM_FAILURE = 1

Verb = TypeVar("Verb", bound=Callable[..., Any])

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("."),
    show_default="the current directory",
    help="pairloop.toml, or the directory that holds it.",
)


def verb(function: Verb) -> Verb:
    """Adds ``--json`` and turns pairloop's errors into a message and an exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @wraps(function)
    def wrapper(*args: Any, as_json: bool, **kwargs: Any) -> Any:
        try:
            return function(*args, as_json=as_json, **kwargs)
        except PairloopError as error:
            fail(error, as_json=as_json)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(SystemFailure(f"{where}{error.strerror or error}"), as_json=as_json)

    return wrapper  # type: ignore[return-value]


def fail(error: PairloopError, *, as_json: bool) -> None:
    """Says what went wrong and exits: 2 where the input is at fault, 1 where the machine is."""
    if as_json:
        emit({"error": {"type": type(error).__name__, "message": str(error), **_problems(error)}})
    click.echo(f"error: {error}", err=True)
    sys.exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_SYSTEM_FAILURE)


def emit(document: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False))


def show(document: Any, text: str, *, as_json: bool) -> None:
    """The JSON document, or its text for people."""
    if as_json:
        emit(document)
    else:
        click.echo(text)


def plain(value: Any) -> Any:
    """Dataclasses, enums, times and paths as JSON values; numbers that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Left-aligned columns; empty cells for None."""
    cells = [list(headers), *[["" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def _problems(error: PairloopError) -> dict[str, Any]:
    return {"problems": [plain(problem) for problem in error.problems]} if isinstance(error, RowsError) else {}
