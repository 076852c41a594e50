"""R4 and R5, read from what `pairloop lab compare --json` printed: semi-online DPO and small groups against GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairloop.lab.claims.base import Claim, Data, Outcome, markdown_table
from pairloop.lab.claims.drawing import axes

COMMAND = "pairloop lab compare --tasks sort,brackets --rollouts 16384 --lr 1e-4 --seeds 0-2 --json > docs/results/compare.json"
SEEDS = 3
"""Fewer training seeds decide nothing."""
NEAR, FAR = 0.03, 0.10
"""Three points, by which equals may differ, and ten, by which offline DPO must fall behind."""
EQUAL, QUARTER = 0.97, 0.93

Entries = Mapping[str, Mapping[str, Any]]


def by_task(data: Data, needed: tuple[str, ...], seeds: int = SEEDS) -> dict[str, Entries]:
    """Task → arm → entry, of the tasks on which all ``needed`` arms ran with enough seeds."""
    tasks: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in data["arms"]:
        if len(entry["score"]["seeds"]) >= seeds:
            tasks.setdefault(entry["task"], {})[entry["arm"]] = entry
    return {task: arms for task, arms in tasks.items() if all(name in arms for name in needed)}


def _score(arms: Entries, name: str) -> float:
    return float(arms[name]["score"]["mean"])


def judge_staleness(data: Data) -> Outcome:
    """R4: on every task online ≥ GRPO - 3 points, s = 10 ≥ online - 3, offline ≤ online - 10."""
    tasks = by_task(data, ("offline", "dpo_s1", "dpo_s10", "grpo_8"))
    if not tasks:
        return Outcome(None, f"no task has offline, dpo_s1, dpo_s10 and grpo_8 with {SEEDS} seeds")
    parts, passed = [], True
    for task, arms in tasks.items():
        online = _score(arms, "dpo_s1")
        gaps = (online - _score(arms, "grpo_8"), _score(arms, "dpo_s10") - online, _score(arms, "offline") - online)
        holds = (gaps[0] >= -NEAR, gaps[1] >= -NEAR, gaps[2] <= -FAR)
        passed = passed and all(holds)
        names = ("online − GRPO", "s = 10 − online", "offline − online")
        parts.append(
            f"{task}: "
            + ", ".join(
                f"{name} {100 * gap:+.1f}{'' if ok else ' (fails)'}" for name, gap, ok in zip(names, gaps, holds, strict=True)
            )
        )
    return Outcome(passed, "points; " + "; ".join(parts), _table(data))


def judge_groups(data: Data) -> Outcome:
    """R5: on every task the score of 2-GRPO over that of 16-GRPO."""
    tasks = by_task(data, ("grpo_16", "grpo_2", "grpo_2_quarter", "grpo_2_eighth"))
    if not tasks:
        return Outcome(None, f"no task has grpo_16 and the three arms of grpo_2 with {SEEDS} seeds")
    parts, passed = [], True
    for task, arms in tasks.items():
        shares = [_score(arms, name) / _score(arms, "grpo_16") for name in ("grpo_2", "grpo_2_quarter", "grpo_2_eighth")]
        passed = passed and shares[0] >= EQUAL and shares[1] >= QUARTER
        parts.append(f"{task}: {shares[0]:.3f} at equal rollouts, {shares[1]:.3f} at a quarter, {shares[2]:.3f} at an eighth")
    return Outcome(passed, "; ".join(parts))


def _table(data: Data) -> str:
    headers = ("task", "arm", "score", "95 % interval", "rollouts", "mean ESS", "KL to base", "CPU s a run")
    rows = [
        (
            entry["task"],
            entry["arm"],
            f"{entry['score']['mean']:.3f} (base {entry['base_score']:.3f})",
            "to ".join(f"{bound:.3f} " for bound in entry["score"]["ci95"] or ()).strip() or "–",
            str(entry["rollouts"]),
            f"{entry['ess_mean']:.2f}",
            f"{entry['kl_to_base']:.2f}",
            f"{entry['cpu_s']:.1f}",
        )
        for entry in data["arms"]
    ]
    return markdown_table(headers, rows)


def plot_staleness(data: Data, path: Path) -> None:
    """Final score of DPO against the steps between two samplings; GRPO and imitation as lines."""
    order = ("dpo_s1", "dpo_s4", "dpo_s10", "dpo_s16", "dpo_s40", "offline")
    colours = ("#3b6fb6", "#1a7f5a", "#b0413e", "#8a6d1d", "#6a4c93")
    tasks = by_task(data, ("grpo_8",))
    with axes(path, xlabel="optimizer steps between two samplings", ylabel="held-out score at T = 1") as plot:
        for colour, (task, arms) in zip(colours, tasks.items(), strict=False):
            found = [name for name in order if name in arms]
            plot.plot(found, [_score(arms, name) for name in found], marker="o", color=colour, label=f"{task}, DPO")
            plot.axhline(_score(arms, "grpo_8"), color=colour, linestyle="--", linewidth=1, label=f"{task}, GRPO-8")
            if "sft" in arms:
                plot.axhline(_score(arms, "sft"), color=colour, linestyle=":", linewidth=1, label=f"{task}, imitation")


COMPARISON: tuple[Claim, ...] = (
    Claim(
        id="R4",
        title="At equal rollouts offline DPO falls far behind; semi-online DPO, online DPO and GRPO are about equal",
        threshold="on each task: online ≥ GRPO − 3 points; s = 10 ≥ online − 3; offline ≤ online − 10; 16,384 rollouts at "
        "learning rate 1e-4, β .1, no NLL, declared beforehand; the SFT control printed",
        command=COMMAND,
        judge=judge_staleness,
        plot=plot_staleness,
        results="compare",
    ),
    Claim(
        id="R5",
        title="GRPO with groups of two keeps up with groups of sixteen",
        threshold="on each task: at equal rollouts ≥ .97 of 16-GRPO's score; at a quarter ≥ .93; at an eighth as it is",
        command=COMMAND,
        judge=judge_groups,
        results="compare",
    ),
)
