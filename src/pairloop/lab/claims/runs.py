"""Claims that train: runs of the comparison, in a folder of their own that nobody keeps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pairloop.lab.claims.base import Settings
from pairloop.lab.compare import Job, Row, compare

WORKERS = 2
"""Runs at a time, one thread each."""


def rows_of(jobs: Sequence[Job], settings: Settings) -> list[Row]:
    """The rows of the jobs, in their order; the tasks' bases are trained anew."""

    def report(done: int, total: int, row: Row) -> None:
        settings.on_progress(f"last: {row['arm']} on {row['task']}", done, total)

    settings.on_progress("bases and first runs", 0, len(jobs))
    with tempfile.TemporaryDirectory() as folder:
        return compare(jobs, Path(folder), Path(folder) / "bases", workers=WORKERS, report=report)
