"""From a file to JSON values, in bounded memory: JSONL line by line; one JSON array or object is read whole.

Each value has its line (in an array: its place, from 1). A ``{"object":"list","data":[…]}``, which is how the OpenAI API hands
out pages, stands for its data.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        first = _first_line(file)
        if first.startswith(_LFS_POINTER):
            yield _problem(path, 1, "lfs_pointer", "a Git LFS pointer stands here instead of the data: run `git lfs pull`")
        elif not first:
            yield _problem(path, 1, "empty_file", "the file holds no rows")
        elif _is_one_value(first, file):
            yield from _whole(path, file)
        else:
            yield from _json_lines(path, file)


def _first_line(file: BinaryIO) -> bytes:
    """The first line that is not blank, stripped."""
    for number, line in enumerate(file):
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            return line.strip()
    return b""


def _is_one_value(first: bytes, file: BinaryIO) -> bool:
    """Whether the file is one JSON value: an array that does not end on a line followed by others, or an object in lines.

    ``file`` stands behind the first line. Where several lines follow and the first is whole JSON by itself, its array is a
    (bad) row.
    """
    if first == b"{":
        return True
    if not first.startswith(b"["):
        return False
    if not _first_line(file):
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def _json_lines(path: Path, file: BinaryIO) -> Iterator[Parsed]:
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        parsed = _parse(path, number, line.rstrip(b"\r\n"), may_be_cut=not line.endswith(b"\n"))
        page = _page(parsed.value)
        if page is None:
            yield parsed
        else:
            yield from (Parsed(number, value) for value in page)


def _whole(path: Path, file: BinaryIO) -> Iterator[Parsed]:
    file.seek(0)
    data = file.read().removeprefix(codecs.BOM_UTF8)
    whole = _parse(path, 1, data, may_be_cut=not data.rstrip().endswith((b"]", b"}")))
    rows = whole.value if isinstance(whole.value, list) else _page(whole.value)
    if whole.problem is not None or rows is None:
        yield whole
    elif not rows:
        yield _problem(path, 1, "empty_file", "the array holds no rows")
    else:
        yield from (Parsed(index, value) for index, value in enumerate(rows, start=1))


def _page(value: Any) -> list[Any] | None:
    if isinstance(value, dict) and value.get("object") == "list" and isinstance(value.get("data"), list):
        rows: list[Any] = value["data"]
        return rows
    return None


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
