"""One tree of errors; each says what is wrong, where, and what to do.

PairloopError
├── UserError                  the input or the configuration is at fault (exit code 2, HTTP 4xx)
│   ├── ConfigError            an illegal setting, with its section and key
│   ├── RowsError              refused dataset rows: every bad row at once
│   ├── NotFoundError          an unknown id or name (HTTP 404)
│   ├── ConflictError          the same id with another body, or a second cycle (HTTP 409)
│   ├── InvalidRequestError    a bad HTTP field, named by ``param`` (HTTP 400)
│   └── ModelError             a model directory that cannot be loaded, with the reason
└── SystemFailure              the machine is at fault (exit code 1, HTTP 5xx)
    ├── StoreError             database or artifact folder: newer schema, broken hash
    │   ├── ArtifactError      files that are not what was published: gone, changed or new
    │   └── UnavailableError   the database is away or locked, the disk is full: the same may succeed later
    │       └── StoreBusyError more writes wait than may; nothing of this one was stored (HTTP 503 with retry-after)
    ├── BrokenVersionError     a version whose files are broken: nothing of it is handed on (HTTP 500)
    ├── EngineError            a policy that cannot sample right now (HTTP 503 with retry-after)
    ├── BusyError              too many ask for something slow at once (HTTP 503 with retry-after)
    └── TrainingError          a training child that ended without a result
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXTS = logging.getLogger("pairloop.texts")
"""Hears what errors say that may quote a prompt, an answer or a comment. Silent unless ``privacy.log_texts``."""
TEXTS.disabled = True


class PairloopError(Exception):
    """The root of all errors that pairloop raises on purpose."""


class UserError(PairloopError):
    """The input or the configuration is at fault; the message says what to change."""


class ConfigError(UserError):
    """An illegal setting."""


class NotFoundError(UserError):
    """An unknown id or name."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConflictError(UserError):
    """The same id with another body, or a second writer; ``param`` names the field, where it is one's."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequestError(UserError):
    """A bad field of an HTTP request; ``param`` names it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelError(UserError):
    """A model directory or hub id that cannot be loaded."""


@dataclass(frozen=True, slots=True)
class RowProblem:
    """One refused row: file, line (1-based), JSON path of the field, a stable reason code, and a sentence."""

    file: str
    line: int
    json_path: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.json_path}: {self.message} [{self.reason}]"


class RowsError(UserError):
    """Refused dataset rows; ``problems`` holds every one of them, ``refused`` counts the rows by their first reason.

    The message shows the counts and the first ``shown`` problems. ``rows``: how many rows there are, where that is known.
    """

    code = "bad_rows"

    def __init__(
        self,
        problems: Sequence[RowProblem],
        *,
        rows: int | None = None,
        refused: Mapping[str, int] | None = None,
        shown: int = 20,
    ) -> None:
        self.problems = tuple(problems)
        self.refused = dict(Counter(refused if refused is not None else _first_reasons(problems)).most_common())
        lines = [str(problem) for problem in problems[:shown]]
        if len(problems) > shown:
            lines.append(f"... and {len(problems) - shown} more")
        of = f" of {rows}" if rows is not None else ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.refused.items())
        super().__init__(f"{sum(self.refused.values())}{of} row(s) refused ({reasons}):\n" + "\n".join(lines))


def _first_reasons(problems: Sequence[RowProblem]) -> list[str]:
    """One reason per row."""
    first: dict[tuple[str, int], str] = {}
    for problem in problems:
        first.setdefault((problem.file, problem.line), problem.reason)
    return list(first.values())


class SystemFailure(PairloopError):
    """The machine is at fault; trying again later may help."""


class StoreError(SystemFailure):
    """Database or artifact folder: newer schema, broken hash."""


class ArtifactError(StoreError):
    """Published files that are not what was published. ``told``: what is wrong, without the place where they lie."""

    def __init__(self, message: str, *, told: str) -> None:
        super().__init__(message)
        self.told = told


class UnavailableError(StoreError):
    """The database is away or locked, or the disk is full or broken: the same call may succeed later."""


class StoreBusyError(UnavailableError):
    """More writes wait for the database than may: this one was not taken, and nothing of it was stored."""


class BrokenVersionError(SystemFailure):
    """A version whose files are not what was published; the message names it, what is wrong, and what to do."""

    code = "broken_artifact"


class EngineError(SystemFailure):
    """A policy that cannot sample right now."""


class BusyError(SystemFailure):
    """More of something slow is asked for than may wait: the same may succeed in a moment."""

    code = "busy"


class TrainingError(SystemFailure):
    """A training child that ended without a result."""


def log_failure(logger: logging.Logger, error: BaseException, text: str, *args: Any, **options: Any) -> None:
    """Log an error that nobody foresaw: its type and where it was raised, and those of its causes.

    Not what it says, for that may quote a message; ``TEXTS`` hears it whole. ``options``: as of ``logger.error``.
    """
    logger.error(f"{text}: %s", *args, trace_of(error), **options)
    TEXTS.error(text, *args, exc_info=error)


def place_of(error: BaseException) -> str:
    """Type of an error, and the innermost place it went through, such as ``ValueError (scorer.py:12)``."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else type(error).__name__


def trace_of(error: BaseException) -> str:
    """Types and places of an error and its causes, the first cause last, without what they say."""
    lines = []
    for one in _with_causes(error):
        lines.append(type(one).__name__)
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(one.__traceback__)]
    return "\n".join(lines)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
