"""The files that a job leaves: its metrics as CSV, and where rows were refused all of them as JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pairloop.errors import RowProblem
from pairloop.loop.jobs.progress import figures
from pairloop.loop.jobs.uploads import keep_text
from pairloop.store import Store
from pairloop.store.files import StoredFile

COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "kl",
    "ess",
    "grad_norm",
    "learning_rate",
    "tokens",
)


def metrics_file(store: Store, job_id: str, rows: Iterable[Mapping[str, Any]]) -> StoredFile:
    """One line per step; the figures of a look at the held-out rows stand on the line of the step before it."""
    lines: dict[int, dict[str, Any]] = {}
    for row in rows:
        lines.setdefault(int(row["step"]), {}).update(figures(row))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines[step] for step in sorted(lines))
    return keep_text(store, text.getvalue(), filename=f"{job_id}-metrics.csv")


def problems_file(store: Store, job_id: str, problems: Sequence[RowProblem]) -> StoredFile:
    """Every refused row: line, JSON path, reason and message."""
    return keep_text(store, "".join(f"{json.dumps(plain(one))}\n" for one in problems), filename=f"{job_id}-refused-rows.jsonl")


def plain(problem: RowProblem) -> dict[str, Any]:
    return {
        "file": problem.file,
        "line": problem.line,
        "json_path": problem.json_path,
        "reason": problem.reason,
        "message": problem.message,
    }
