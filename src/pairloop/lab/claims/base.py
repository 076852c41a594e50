"""What a claim is: a sentence, a threshold, the command that measures it, and a judge who reads only what was measured.

Measuring and judging are apart on purpose: results are kept as files, and a page is made of them again at any time. A
claim whose measurement failed its threshold is published like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Data = Mapping[str, Any]
"""What was measured, as plain JSON."""

Progress = Callable[[str, int, int], None]
"""(what is under way, done, of how many)."""


def _silent(what: str, done: int, of: int) -> None:
    del what, done, of


@dataclass(frozen=True, slots=True)
class Settings:
    """seed: names every random number of a measurement. on_progress: told what is under way."""

    seed: int = 0
    on_progress: Progress = _silent


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether the threshold was met (None: the data do not decide it), one line with the figures, and Markdown below it."""

    passed: bool | None
    result: str
    details: str = ""

    @property
    def word(self) -> str:
        return {True: "pass", False: "fail", None: "undecided"}[self.passed]


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the table of claims.

    command: what a reader types to measure it again. judge: reads the data; None where nothing is measured yet. run:
    measures; None where another verb writes the data. results: the stem of the results file, where several claims share
    one or another verb writes it; otherwise the claim's id. plot: draws the data into a PNG, whose folder exists.
    """

    id: str
    title: str
    threshold: str
    command: str
    judge: Callable[[Data], Outcome] | None = None
    run: Callable[[Settings], dict[str, Any]] | None = None
    plot: Callable[[Data, Path], None] | None = None
    results: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.results or self.id}.json"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell is escaped."""
    lines: list[Sequence[str]] = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
