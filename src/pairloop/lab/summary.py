"""What a comparison says: by arm and task the mean over seeds with its interval, and how many rollouts an arm needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from pairloop.statistics import mean_over_seeds

YARDSTICK = "grpo_8"
"""The arm whose final score the others are held against."""

Row = Mapping[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """One entry per arm and task, in the order of the rows, as `pairloop lab compare --json` prints it.

    ``rollouts_to_95``: at which the mean curve reaches 95 % of the gain of `YARDSTICK`; None where it never does, or where
    that arm was not run. ``cpu_s`` and ``wall_s``: mean of a run, also by ``phases``.
    """
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["arm"], row["task"]), []).append(row)
    return {"arms": [_entry(arm, task, found, cells.get((YARDSTICK, task))) for (arm, task), found in cells.items()]}


def _entry(arm: str, task: str, rows: Sequence[Row], yardstick: Sequence[Row] | None) -> dict[str, Any]:
    score = mean_over_seeds([row["score"] for row in rows])
    base = fmean(row["curve"][0]["score"] for row in rows)
    last = [row["curve"][-1] for row in rows]
    curve = mean_curve(rows)
    entry: dict[str, Any] = {
        "arm": arm,
        "task": task,
        "score": {
            "mean": score.mean,
            "ci95": [score.lo, score.hi] if len(rows) > 1 else None,
            "seeds": [row["seed"] for row in rows],
        },
        "base_score": base,
        "greedy": fmean(row["greedy"] for row in rows),
        "rollouts": round(fmean(row["rollouts"] for row in rows)),
        "ess_mean": fmean(row["ess"] for row in rows),
        **{clock: fmean(sum(row[clock].values()) for row in rows) for clock in ("cpu_s", "wall_s")},
        "phases": {clock: _phases([row[clock] for row in rows]) for clock in ("cpu_s", "wall_s")},
        **{name: fmean(point[name] for point in last) for name in ("entropy", "kl_to_base", "length")},
        "curve": curve,
    }
    if yardstick:
        best = fmean(row["score"] for row in yardstick)
        entry["share_of_grpo_gain"] = (score.mean - base) / (best - base) if best != base else None
        entry["rollouts_to_95"] = rollouts_to(curve, base + 0.95 * (best - base))
    return entry


def mean_curve(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Mean score and its 95 % half-width over seeds at each measurement that all runs share."""
    points = min(len(row["curve"]) for row in rows)
    curve = []
    for i in range(points):
        # The last measurement is the last of each run, however many came before.
        at = [row["curve"][-1 if i == points - 1 else i] for row in rows]
        found = mean_over_seeds([point["score"] for point in at])
        half = found.hi - found.mean if len(rows) > 1 else 0.0
        curve.append({"rollouts": fmean(point["rollouts"] for point in at), "score": found.mean, "half": half})
    return curve


def rollouts_to(curve: Sequence[Mapping[str, float]], target: float) -> float | None:
    """Where the curve first reaches ``target``, by straight lines between its points; None where it never does."""
    if curve and curve[0]["score"] >= target:
        return curve[0]["rollouts"]
    for before, after in pairwise(curve):
        if after["score"] >= target:
            share = (target - before["score"]) / (after["score"] - before["score"])
            return before["rollouts"] + share * (after["rollouts"] - before["rollouts"])
    return None


def plot(summary: Mapping[str, Any], out_dir: Path) -> list[Path]:
    """One PNG of learning curves per task."""
    from matplotlib.figure import Figure

    paths = []
    for task in dict.fromkeys(entry["task"] for entry in summary["arms"]):
        entries = [entry for entry in summary["arms"] if entry["task"] == task]
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for i, entry in enumerate(entries):
            x = [point["rollouts"] for point in entry["curve"]]
            y = [point["score"] for point in entry["curve"]]
            line = axes.plot(x, y, marker=".", linestyle=("-", "--", ":")[i // 10 % 3], label=entry["arm"])[0]
            half = [point["half"] for point in entry["curve"]]
            low, high = ([v + sign * h for v, h in zip(y, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, alpha=0.12, color=line.get_color())
        seeds = len(entries[0]["score"]["seeds"])
        axes.set(xlabel="rollouts", ylabel="held-out score at T = 1", title=f"{task}: mean of {seeds} seeds, 95 % band")
        axes.set_ylim(0, 1)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        path = out_dir / f"compare-{task}.png"
        figure.savefig(path, dpi=120)
        paths.append(path)
    return paths


def _phases(of_runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for run in of_runs for name in run)
    return {name: fmean(run.get(name, 0.0) for run in of_runs) for name in names}
