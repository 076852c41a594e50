"""R7: plain DPO on one sampling, pass after pass, first gains and then destroys; the round controller ends it near the peak."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairloop.lab.arms import ARMS
from pairloop.lab.claims import drawing
from pairloop.lab.claims.base import Claim, Data, Outcome, Settings, markdown_table
from pairloop.lab.claims.runs import rows_of
from pairloop.lab.compare import jobs_of
from pairloop.lab.run import Budget
from pairloop.statistics import mean_over_seeds, percent

TASK, RATE = "caesar", 1e-4
FREE, CONTROLLED = "one_off", "one_off_controlled"
SEEDS = 3
POINTS, PROBLEMS = 32, 500
WITHIN = 0.9
"""Of the peak's score."""


def _run(settings: Settings) -> dict[str, Any]:
    seeds = range(settings.seed, settings.seed + SEEDS)
    budget = Budget(learning_rate=RATE, points=POINTS, problems=PROBLEMS, final_problems=PROBLEMS)
    rows = rows_of(jobs_of([ARMS[FREE], ARMS[CONTROLLED]], [TASK], seeds, budget), settings)
    return {
        "task": TASK,
        "learning_rate": RATE,
        "problems": PROBLEMS,
        "rows": [
            {
                "arm": row["arm"],
                "seed": row["seed"],
                "steps": row["steps"],
                "stop": row["stops"][0],
                "scores": [point["score"] for point in row["curve"]],
            }
            for row in rows
        ],
    }


def _of(data: Data, arm: str) -> list[Mapping[str, Any]]:
    return [row for row in data["rows"] if row["arm"] == arm]


def _peak(data: Data) -> tuple[int, list[float]]:
    """Where the mean curve of the uncontrolled runs is highest, and that curve."""
    curve = [mean_over_seeds(scores).mean for scores in zip(*(row["scores"] for row in _of(data, FREE)), strict=True)]
    return curve.index(max(curve)), curve


def judge(data: Data) -> Outcome:
    """The hump: what seeds lose from the mean curve's peak to the end, with its interval. The stop: every seed counts."""
    at, curve = _peak(data)
    free, controlled = _of(data, FREE), _of(data, CONTROLLED)
    lost = mean_over_seeds([row["scores"][at] - row["scores"][-1] for row in free])
    ends = [row["scores"][-1] for row in controlled]
    peak, step = curve[at], round(at * free[0]["steps"] / (len(curve) - 1))
    passed = 0 < at < len(curve) - 1 and lost.lo > 0 and min(ends) >= WITHIN * peak
    stops = ", ".join(f"{row['stop']} at step {row['steps']}" for row in controlled)
    result = (
        f"without the controller {curve[0]:.3f} → {peak:.3f} (step {step}) → {curve[-1]:.3f} (step {free[0]['steps']}), "
        f"{100 * lost.mean:.1f} [{100 * lost.lo:.1f}, {100 * lost.hi:.1f}] points lost after the peak; with it rounds end at "
        f"{mean_over_seeds(ends).mean:.3f} (lowest {min(ends):.3f}, {percent(min(ends) / peak)} of the peak)"
    )
    return Outcome(passed, result, f"{_table(data, peak)}\n\nWhy the controlled rounds ended, seed by seed: {stops}.")


def _table(data: Data, peak: float) -> str:
    rows = [
        (
            str(free["seed"]),
            *(
                f"{score:.3f}"
                for score in (free["scores"][0], max(free["scores"]), free["scores"][-1], controlled["scores"][-1])
            ),
            percent(controlled["scores"][-1] / peak),
            str(controlled["steps"]),
        )
        for free, controlled in zip(_of(data, FREE), _of(data, CONTROLLED), strict=True)
    ]
    headers = ("seed", "base", "its own peak", "end, 8 passes", "controller's end", "of the mean curve's peak", "its steps")
    return markdown_table(headers, rows)


def plot(data: Data, path: Path) -> None:
    """The curves without the controller, and where it ends the rounds."""
    with drawing.axes(path, xlabel="optimizer steps on one sampling of 4,096 completions", ylabel="held-out score") as axes:
        for i, row in enumerate(_of(data, FREE)):
            x = [row["steps"] * j / (len(row["scores"]) - 1) for j in range(len(row["scores"]))]
            axes.plot(x, row["scores"], color=drawing.RED, alpha=0.5, label="plain DPO, β .1" if i == 0 else None)
        ends = _of(data, CONTROLLED)
        label = "ended by the controller"
        axes.scatter(
            [row["steps"] for row in ends], [row["scores"][-1] for row in ends], color=drawing.BLUE, zorder=3, label=label
        )


R7 = Claim(
    id="R7",
    title="One-off DPO over-optimises, and the round controller stops it in time",
    threshold="plain DPO on one sampling, eight passes: from the mean curve's peak to the end the interval of the loss over "
    f"{SEEDS} seeds lies above 0; under the product's controller every seed ends within 10 % of the peak's score",
    command="pairloop lab claim R7",
    judge=judge,
    run=_run,
    plot=plot,
)
