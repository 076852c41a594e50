"""R8: each round of the recipe starts from what the last one learned, and adds to it; less and less."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from pairloop.lab.arms import ARMS
from pairloop.lab.claims import drawing
from pairloop.lab.claims.base import Claim, Data, Outcome, Settings, markdown_table
from pairloop.lab.claims.runs import rows_of
from pairloop.lab.compare import jobs_of
from pairloop.lab.run import Budget
from pairloop.statistics import mean_over_seeds
from pairloop.types import Interval

ARM = "recipe"
TASKS = ("support", "cipher")
SEEDS = 5
PROBLEMS = 1_000
NEEDED = 3
"""Rounds that must pay."""


def _run(settings: Settings) -> dict[str, Any]:
    arm = ARMS[ARM]
    seeds = range(settings.seed, settings.seed + SEEDS)
    # One measurement at the end of each round, all on the same held-out problems.
    jobs = jobs_of([arm], TASKS, seeds, Budget(points=arm.rounds, problems=PROBLEMS, final_problems=PROBLEMS))
    rows = rows_of(jobs, settings)
    return {
        "arm": ARM,
        "problems": PROBLEMS,
        "rows": [
            {"task": row["task"], "seed": row["seed"], "scores": [point["score"] for point in row["curve"]]} for row in rows
        ],
    }


def _curves(data: Data) -> dict[str, list[list[float]]]:
    """Task → the held-out scores of each seed: of the base, and after each round."""
    curves: dict[str, list[list[float]]] = {}
    for row in data["rows"]:
        curves.setdefault(row["task"], []).append(row["scores"])
    return curves


def gains(curves: list[list[float]]) -> list[Interval]:
    """What each round added, mean over seeds; paired, for a round is compared with the round before it of its own seed."""
    added = [[after - before for before, after in pairwise(curve)] for curve in curves]
    return [mean_over_seeds(of_round) for of_round in zip(*added, strict=True)]


def judge(data: Data) -> Outcome:
    """On every task the interval of each of the first three rounds' gains lies above 0."""
    found = {task: gains(curves) for task, curves in _curves(data).items()}
    parts = [
        f"{task}: " + ", ".join(f"{100 * gain.mean:+.1f} [{100 * gain.lo:+.1f}, {100 * gain.hi:+.1f}]" for gain in of_rounds)
        for task, of_rounds in found.items()
    ]
    passed = all(gain.lo > 0 for of_rounds in found.values() for gain in of_rounds[:NEEDED])
    return Outcome(passed, "points added by each round, with 95 % intervals; " + "; ".join(parts), _table(data))


def _table(data: Data) -> str:
    curves = _curves(data)
    headers = ("task", "base", *(f"round {i}" for i in range(1, _measured(data))))
    rows = [
        (task, *(f"{mean_over_seeds(scores).mean:.3f}" for scores in zip(*found, strict=True)))
        for task, found in curves.items()
    ]
    return (
        f"{markdown_table(headers, rows)}\n\nHeld-out score at T = 1 of {data['problems']:,} problems, mean of seeds; "
        f"arm `{data['arm']}`, 1,024 completions a round."
    )


def plot(data: Data, path: Path) -> None:
    """One line per seed."""
    with drawing.axes(path, xlabel="rounds", ylabel="held-out score at T = 1") as axes:
        for colour, (task, curves) in zip((drawing.BLUE, drawing.RED), _curves(data).items(), strict=False):
            for i, curve in enumerate(curves):
                label = task if i == 0 else None
                axes.plot(range(len(curve)), curve, color=colour, marker="o", markersize=3, alpha=0.6, label=label)
        axes.set_xticks(range(_measured(data)))


def _measured(data: Data) -> int:
    """Measurements per run: of the base, and after each round."""
    return max(len(row["scores"]) for row in data["rows"])


R8 = Claim(
    id="R8",
    title="Rounds pay, with diminishing returns",
    threshold=f"on each task the first {NEEDED} rounds add to the held-out score, each with its 95 % interval over "
    f"{SEEDS} seeds above 0",
    command="pairloop lab claim R8",
    judge=judge,
    run=_run,
    plot=plot,
)
