"""R6: over a grid of refresh and learning rates, the mean effective sample size predicts the final score of DPO."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from pairloop.lab.arms import ARMS
from pairloop.lab.claims import drawing
from pairloop.lab.claims.base import Claim, Data, Outcome, Settings, markdown_table
from pairloop.lab.claims.runs import rows_of
from pairloop.lab.compare import jobs_of
from pairloop.lab.run import Budget
from pairloop.statistics import spearman

TASKS = ("sort", "brackets")
REFRESH = ("dpo_s1", "dpo_s4", "dpo_s10", "dpo_s16", "dpo_s40", "offline")
RATES = (1e-4, 4e-4)
ROLLOUTS = 16_384
SEEDS = 3
NEEDED = 0.7


def _run(settings: Settings) -> dict[str, Any]:
    arms = [ARMS[name] for name in REFRESH]
    seeds = range(settings.seed, settings.seed + SEEDS)
    jobs = [
        job for rate in RATES for job in jobs_of(arms, TASKS, seeds, Budget(rollouts=ROLLOUTS, learning_rate=rate, points=1))
    ]
    cells: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for job, row in zip(jobs, rows_of(jobs, settings), strict=True):
        cells.setdefault((job.task, job.arm.name, job.budget.learning_rate), []).append((row["ess"], row["score"]))
    return {
        "rollouts": ROLLOUTS,
        "seeds": list(seeds),
        "rows": [
            {"task": task, "arm": arm, "learning_rate": rate, "ess": fmean(ess), "score": fmean(score), "scores": list(score)}
            for (task, arm, rate), runs in cells.items()
            for ess, score in [zip(*runs, strict=True)]
        ],
    }


def judge(data: Data) -> Outcome:
    """On every task: rank correlation over the cells of the grid, each the mean of its seeds."""
    found = {}
    for task in dict.fromkeys(row["task"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["task"] == task]
        found[task] = (spearman([row["ess"] for row in rows], [row["score"] for row in rows]), len(rows))
    result = "Spearman's rank correlation of mean ESS and final score: " + ", ".join(
        f"{task} {value:.2f} ({n} cells)" for task, (value, n) in found.items()
    )
    return Outcome(all(value >= NEEDED for value, _ in found.values()), result, _table(data))


def _table(data: Data) -> str:
    cells = {(row["task"], row["arm"], row["learning_rate"]): row for row in data["rows"]}
    rates = sorted({rate for _, _, rate in cells})
    rows = [
        (task, arm, *(f"{cell['score']:.3f} (ESS {cell['ess']:.2f})" for rate in rates for cell in [cells[task, arm, rate]]))
        for task, arm in dict.fromkeys((task, arm) for task, arm, _ in cells)
    ]
    headers = ("task", "arm", *(f"learning rate {rate:g}" for rate in rates))
    return f"{markdown_table(headers, rows)}\n\nMeans of {len(data['seeds'])} seeds, {data['rollouts']:,} rollouts each, β .1."


def plot(data: Data, path: Path) -> None:
    """One point per cell of the grid."""
    with drawing.axes(path, xlabel="mean effective sample size of the steps", ylabel="held-out score at T = 1") as axes:
        for colour, task in zip((drawing.BLUE, drawing.RED), dict.fromkeys(row["task"] for row in data["rows"]), strict=False):
            rows = [row for row in data["rows"] if row["task"] == task]
            axes.scatter([row["ess"] for row in rows], [row["score"] for row in rows], color=colour, s=24, label=task)


R6 = Claim(
    id="R6",
    title="Staleness is the cost: the mean ESS predicts the final score",
    threshold=f"on each task: Spearman(mean ESS, final score) ≥ {NEEDED} over a grid of s × learning rate "
    f"({len(REFRESH)} × {len(RATES)})",
    command="pairloop lab claim R6",
    judge=judge,
    run=_run,
    plot=plot,
)
