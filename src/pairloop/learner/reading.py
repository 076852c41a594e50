"""A run's metrics file as people look at it: however long it has grown, little of it is read. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from pairloop.learner.child import Row

WHOLE_BYTES = 1_000_000
"""Metrics files up to this size are read whole."""
SAMPLES = 400
"""Rows that are read of a longer one, at equal distances; so much of its end besides."""
END_BYTES = 100_000


class Rows(NamedTuple):
    """Rows in their order; not ``is_whole`` where some in between were left out."""

    rows: list[Row]
    is_whole: bool


def sample_rows(path: Path, *, whole: int = WHOLE_BYTES, samples: int = SAMPLES, end: int = END_BYTES) -> Rows:
    """All rows of a metrics file of up to ``whole`` bytes; of a longer one ``samples``, and those of its last ``end`` bytes."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= whole:
                file.seek(0)
                return Rows(list(_rows_of(file.read())), True)
            return Rows(list(_spread(file, size - end, samples)), False)
    except FileNotFoundError:
        return Rows([], True)


def _spread(file: IO[bytes], end: int, samples: int) -> Iterator[Row]:
    """The first row, then those that follow upon each of so many places up to ``end``, then all that come after it."""
    file.seek(0)
    yield from _rows_of(file.readline())
    at = file.tell()
    for sample in range(1, samples):
        place = end * sample // samples
        if place < at:
            continue  # inside of a row that was taken
        file.seek(place)
        file.readline()
        yield from _rows_of(file.readline())
        at = file.tell()
    file.seek(max(at, end))
    if at < end:
        file.readline()
    yield from _rows_of(file.read())


def _rows_of(data: bytes) -> Iterator[Row]:
    """The whole lines; what an interrupted write has left behind is no row."""
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        yield json.loads(line)
