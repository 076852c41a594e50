"""What is known, out again as rows of any family that can hold it; what a family cannot hold is counted by reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairloop.errors import UserError
from pairloop.formats.family import CannotHold
from pairloop.formats.groups import draft_of_group, draft_of_row
from pairloop.formats.registry import FAMILIES, family_named
from pairloop.formats.row import Draft
from pairloop.formats.trainers import TRAINERS
from pairloop.types import LabelledGroup, Source, TrainingRow

Writable = TrainingRow | LabelledGroup | Draft

FORMATS = (*(name for name, family in FAMILIES.items() if family.write is not None), *TRAINERS)
"""Everything that can be written: the families by name, and the trainers that take a family with conditions."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """``rows`` written, and ``refused`` by reason because the format cannot hold them."""

    rows: int
    refused: dict[str, int]


def write_rows(path: Path, said: Iterable[Writable], format_name: str = "openai", *, skip_refused: bool = False) -> WriteResult:
    """Write one JSONL row each; UserError with the count per reason where the format cannot hold some.

    ``skip_refused`` writes the others then. The file appears whole or not at all, its folder where it is missing.
    """
    rows = Rows(format_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(rows.lines(said))
        if not skip_refused:
            rows.or_raise()
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return WriteResult(rows.written, dict(rows.refused))


def describe(path: Path, format_name: str) -> Path | None:
    """Write what the trainer needs beside the rows in ``path`` and say where; None where it needs nothing."""
    return TRAINERS[format_name].describe(path) if format_name in TRAINERS else None


class Rows:
    """Lines of one format, one by one, and the count of what it could not hold."""

    def __init__(self, format_name: str) -> None:
        self.format_name = format_name
        self.written = 0
        self.refused: Counter[str] = Counter()
        self._write = _writer(format_name)

    def lines(self, said: Iterable[Writable]) -> Iterator[str]:
        for one in said:
            draft = _draft(one)
            try:
                row = {**self._write(draft), **_signature(draft)}
            except CannotHold as refusal:
                self.refused[refusal.reason] += 1
                continue
            self.written += 1
            yield json.dumps(row, ensure_ascii=False) + "\n"

    def or_raise(self) -> None:
        """UserError that names the format, the reasons with their counts, and what to do."""
        if self.refused:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.refused.most_common())
            count, total = self.refused.total(), self.refused.total() + self.written
            raise UserError(
                f"format {self.format_name!r} cannot hold {count} of {total} rows ({reasons}); choose another one "
                f"({', '.join(FORMATS)}), or leave those out (skip_refused)"
            )


def _writer(format_name: str) -> Callable[[Draft], dict[str, Any]]:
    if format_name in TRAINERS:
        return TRAINERS[format_name].write
    if format_name not in FORMATS:
        read_only = f"the family {format_name!r} is read, not written" if format_name in FAMILIES else ""
        raise UserError(f"{read_only or f'unknown format {format_name!r}'}; known are {', '.join(FORMATS)}")
    write = family_named(format_name).write
    assert write is not None, "FORMATS names families that write"
    return write


def _draft(said: Writable) -> Draft:
    if isinstance(said, Draft):
        return said
    return draft_of_group(said) if isinstance(said, LabelledGroup) else draft_of_row(said)


def _signature(draft: Draft) -> Mapping[str, str]:
    """Who said so: the source where it is no person, the rater where it is one for all and named."""
    keys = {} if draft.source is Source.HUMAN else {"source": draft.source.value}
    raters = {mark.rater_id for mark in draft.marks}
    rater = raters.pop() if len(raters) == 1 else None
    return keys if rater is None else {**keys, "rater_id": rater}
