"""From a file to JSON values: JSONL or one JSON array, each value with its line (or its place in the array, from 1)."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairloop.errors import RowProblem, UserError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class Parsed:
    """One row of a file: a JSON value, or the problem that kept it from being one."""

    line: int
    value: Any = None
    problem: RowProblem | None = None


class _BadJson(ValueError):
    """JSON that Python would take and we do not."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_values(path: Path) -> Iterator[Parsed]:
    """Every row of ``path`` in order; blank lines are no rows. UserError where the file itself cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    data = data.removeprefix(codecs.BOM_UTF8)
    if data.startswith(_LFS_POINTER):
        message = "a Git LFS pointer stands here instead of the data: run `git lfs pull`"
        yield _problem(path, 1, "lfs_pointer", message)
    elif not data.strip():
        yield _problem(path, 1, "empty_file", "the file holds no rows")
    elif data.lstrip().startswith(b"[") and not _is_json_lines(data):
        yield from _array(path, data)
    else:
        yield from _json_lines(path, data)


def _is_json_lines(data: bytes) -> bool:
    """True where several lines follow and the first is whole JSON by itself: then its array is a (bad) row, not the file."""
    first, _, rest = data.lstrip().partition(b"\n")
    if not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path, data: bytes) -> Iterator[Parsed]:
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parse(path, number, line, may_be_cut=number == len(lines))


def _array(path: Path, data: bytes) -> Iterator[Parsed]:
    whole = _parse(path, 1, data, may_be_cut=not data.rstrip().endswith(b"]"))
    if whole.problem is not None:
        yield whole
    elif not whole.value:
        yield _problem(path, 1, "empty_file", "the array holds no rows")
    else:
        for index, value in enumerate(whole.value, start=1):
            yield Parsed(index, value)


def _parse(path: Path, line: int, data: bytes, *, may_be_cut: bool) -> Parsed:
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return _problem(path, line, "not_utf8", f"not UTF-8 at byte {error.start} of the row")
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        hint = "; the file ends here, so it may be truncated" if may_be_cut else ""
        return _problem(path, at, "not_json", f"not JSON at column {error.colno}: {error.msg}{hint}")
    except _BadJson as error:
        return _problem(path, line, error.reason, str(error))
    except (RecursionError, ValueError) as error:
        return _problem(path, line, "not_json", f"not JSON that can be read: {error}")
    return Parsed(line, value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _BadJson("duplicate_key", f"the key {twice!r} stands twice in one object")
    return made


def _no_constant(name: str) -> float:
    raise _BadJson("not_json", f"{name} is not JSON")


def _problem(path: Path, line: int, reason: str, message: str) -> Parsed:
    return Parsed(line, problem=RowProblem(str(path), line, "$", reason, message))
