"""From a file of dataset rows to labelled groups, or to every reason why a row was refused.

Rows in = rows kept + rows refused, always. A file is read row by row: ``check_rows`` keeps nothing but its problems,
``each_group`` yields the groups, ``read_rows`` collects both.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pairloop.errors import RowProblem, RowsError
from pairloop.formats.family import Family
from pairloop.formats.fit import MAX_CHARS, Encoder, Fit
from pairloop.formats.groups import GroupBuilder, plain
from pairloop.formats.lines import Parsed, read_values
from pairloop.formats.registry import detect, family_named
from pairloop.formats.row import Draft, Row, kind_of
from pairloop.types import LabelledGroup


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a file holds: ``rows`` = ``kept`` + the sum of ``refused``.

    ``refused`` counts each refused row once, under its first problem; ``problems`` has every problem of every row.
    ``counts`` describes all rows, refused ones included, as far as they could be read: ``prompts_in_file`` (distinct) and
    ``unanimous_in_file`` (comparisons on which at least two raters picked, all the same).
    """

    family: str | None
    rows: int
    kept: int
    problems: list[RowProblem]
    refused: dict[str, int]
    counts: dict[str, int]

    def or_raise(self) -> None:
        """RowsError with every problem where a row was refused."""
        if self.problems:
            raise RowsError(self.problems, rows=self.rows, refused=self.refused)


@dataclass(frozen=True, slots=True)
class ReadResult:
    """The groups of a file, and what `CheckResult` says about it."""

    family: str | None
    rows: int
    groups: list[LabelledGroup]
    problems: list[RowProblem]
    refused: dict[str, int]
    counts: dict[str, int]

    def or_raise(self) -> ReadResult:
        """This result; RowsError with every problem where a row was refused."""
        if self.problems:
            raise RowsError(self.problems, rows=self.rows, refused=self.refused)
        return self


def read_rows(
    path: Path,
    *,
    family: str | None = None,
    max_chars: int = MAX_CHARS,
    tokens: Encoder | None = None,
    max_length: int | None = None,
    policy: str = "imported",
    at: datetime | None = None,
) -> ReadResult:
    """Every row of a JSONL file or JSON array; problems name file, line (array: place from 1), JSON path and reason.

    ``family`` is a name of ``registry.FAMILIES``; without it the first row that shows a family's keys decides for the
    whole file. A row whose prompt and longest answer exceed ``max_chars`` characters, or (with ``tokens``) ``max_length``
    tokens once the model's template has rendered them, is refused as ``over_long``; one that the template refuses as
    ``template_refused``. ``at`` becomes the groups' time, by default the file's own. Ids depend on the policy and the rows
    alone: reading a file again gives the same groups. UserError where the file cannot be read or the family is unknown.
    """
    reading = _Reading(path, family, Fit(max_chars, tokens, max_length))
    groups = list(reading.groups(policy, at))
    done = reading.result()
    return ReadResult(done.family, done.rows, groups, done.problems, done.refused, done.counts)


def check_rows(
    path: Path,
    *,
    family: str | None = None,
    max_chars: int = MAX_CHARS,
    tokens: Encoder | None = None,
    max_length: int | None = None,
) -> CheckResult:
    """What ``read_rows`` would say, without keeping a single row: memory grows with the problems, not with the file."""
    reading = _Reading(path, family, Fit(max_chars, tokens, max_length))
    for _ in reading.good_rows():
        pass
    return reading.result()


def each_group(
    path: Path,
    *,
    family: str | None = None,
    max_chars: int = MAX_CHARS,
    policy: str = "imported",
    at: datetime | None = None,
) -> Iterator[LabelledGroup]:
    """The groups of ``read_rows``, one by one; refused rows are passed over (``check_rows`` tells them)."""
    return _Reading(path, family, Fit(max_chars)).groups(policy, at)


class _Reading:
    """One pass over a file; the counts are whole when ``good_rows`` is exhausted."""

    def __init__(self, path: Path, family: str | None, fit: Fit) -> None:
        self._path = path
        self._forced = family_named(family) if family is not None else None
        self._family = self._forced or _family_of(path)
        self._fit = fit
        self._rows = 0
        self._problems: list[RowProblem] = []
        self._refused: Counter[str] = Counter()
        self._prompts: set[bytes] = set()
        self._unanimous = 0

    def good_rows(self) -> Iterator[tuple[Row, Draft]]:
        for item in read_values(self._path):
            self._rows += 1
            row, draft = self._read(item)
            if draft is not None:
                self._count(draft)
                self._fit.check(row, draft)
            if draft is not None and not row.problems:
                yield row, draft
            else:
                self._problems.extend(row.problems)
                self._refused[row.problems[0].reason] += 1

    def groups(self, policy: str, at: datetime | None) -> Iterator[LabelledGroup]:
        builder = GroupBuilder(policy, at or datetime.fromtimestamp(self._path.stat().st_mtime, UTC))
        return (builder.group(row, draft) for row, draft in self.good_rows())

    def result(self) -> CheckResult:
        counts = {"prompts_in_file": len(self._prompts), "unanimous_in_file": self._unanimous}
        kept = self._rows - self._refused.total()
        name = self._family.name if self._family else None
        return CheckResult(name, self._rows, kept, self._problems, dict(self._refused), counts)

    def _read(self, item: Parsed) -> tuple[Row, Draft | None]:
        """The row with its problems, and what it says where it is an object of the file's family."""
        file = str(self._path)
        if item.problem is not None:
            return Row(file, item.line, {}, [item.problem]), None
        if not isinstance(item.value, dict):
            row = Row(file, item.line, {})
            row.refuse("$", "not_an_object", f"a row must be an object, found {kind_of(item.value)}")
            return row, None
        row = Row(file, item.line, item.value)
        if self._family is None:
            row.refuse("$", "unknown_family", f"no known row family has these keys: {', '.join(item.value) or '(none)'}")
            return row, None
        other = None if self._forced else detect(item.value)
        if other is not None and other is not self._family:
            message = f"a row of family {other.name} in a file of family {self._family.name}: give each family its own file"
            row.refuse("$", "mixed_families", message)
            return row, None
        return row, _with_common_keys(row, self._family.parse(row))

    def _count(self, draft: Draft) -> None:
        if draft.prompt is not None:
            self._prompts.add(hashlib.sha256(repr(plain(draft.prompt)).encode("utf-8", "backslashreplace")).digest()[:16])
        votes = [mark.label for mark in draft.marks if mark.label is not None]
        self._unanimous += len(votes) > 1 and len(set(votes)) == 1


def _family_of(path: Path) -> Family | None:
    """The family of the first row that shows one; only the rows up to it are read."""
    values = (item.value for item in read_values(path) if isinstance(item.value, dict))
    return next((family for value in values if (family := detect(value)) is not None), None)


def _with_common_keys(row: Row, draft: Draft) -> Draft:
    """What a row of any family may say: its source, and (beside its messages) whether tools may be called in parallel."""
    holder, path = (row.value["input"], "$.input") if "input" in row.value else (row.value, "$")
    source = row.source() if "source" in row.value else draft.source
    parallel = row.flag(holder, path, "parallel_tool_calls", default=True)
    if source is draft.source and parallel:
        return draft
    return replace(draft, source=source, parallel_tool_calls=parallel)
