"""R13, the few-rounds gap, read from `pairloop lab compare --json`: four rounds of the recipe against GRPO that never waits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairloop.lab.claims import drawing
from pairloop.lab.claims.base import Claim, Data, Outcome, markdown_table
from pairloop.lab.claims.comparison import by_task
from pairloop.statistics import percent

GRPO, RECIPE, PLAIN = "grpo_8", "recipe", "rounds_4"
CONTROLLED = "recipe_controlled"
IMITATION = ("rounds_4_sft", "rounds_4_sft_8", "rounds_4_sft_32", "rounds_4_sft_64")
"""The control: the best of 2, 8, 32 and 64, in the same four rounds; the best of the four counts."""
TUNED_ON = ("sort", "style")
SEEDS = 5
NEEDED = 0.95
ASKED = (GRPO, RECIPE, CONTROLLED, PLAIN, *IMITATION)
COMMAND = f"pairloop lab compare --arms {','.join(ASKED)} --seeds 0-4 --json > docs/results/few_rounds.json"

Entry = Mapping[str, Any]


def _score(entry: Entry) -> float:
    return float(entry["score"]["mean"])


def share(arms: Mapping[str, Entry], name: str) -> float | None:
    """The arm's part of GRPO's gain; None where GRPO gained nothing."""
    base, best = float(arms[GRPO]["base_score"]), _score(arms[GRPO])
    return (_score(arms[name]) - base) / (best - base) if best > base else None


def imitation(arms: Mapping[str, Entry]) -> Entry:
    """The best of the controls."""
    return max((arms[name] for name in IMITATION), key=_score)


def needs_contrast(arms: Mapping[str, Entry]) -> bool:
    """True where imitation, with the best of its settings, stays below GRPO."""
    return _score(imitation(arms)) < _score(arms[GRPO])


def judge(data: Data) -> Outcome:
    """On every task the share of GRPO's gain; and not below imitation where that stays below GRPO."""
    tasks = by_task(data, ASKED, SEEDS)
    if not tasks:
        return Outcome(None, f"no task has all arms with {SEEDS} seeds")
    shares = {task: share(arms, RECIPE) for task, arms in tasks.items()}
    short = {task: value for task, value in shares.items() if value is None or value < NEEDED}
    contrast = {task: arms for task, arms in tasks.items() if needs_contrast(arms)}
    below = [task for task, arms in contrast.items() if _score(arms[RECIPE]) < _score(imitation(arms))]
    said = ", ".join(f"{task} {'no gain to share' if value is None else percent(value)}" for task, value in shares.items())
    parts = [
        f"the recipe's part of GRPO's gain: {said}",
        f"below {percent(NEEDED)} on {', '.join(short) or 'none'}",
        f"imitation stays below GRPO on {', '.join(contrast) or 'none'}"
        + (f", and above the recipe there on {', '.join(below) or 'none'}" if contrast else ""),
    ]
    return Outcome(not short and not below, "; ".join(parts), _table(tasks))


def _table(tasks: Mapping[str, Mapping[str, Entry]]) -> str:
    headers = (
        "task",
        "base",
        "GRPO-8, 64 samplings",
        "recipe, 4 samplings",
        "of the gain",
        "… under the controller",
        "plain DPO",
        "best of 2, 8, 32, 64 imitated",
        "ESS",
    )
    rows = [
        (
            task + (" (tuned on)" if task in TUNED_ON else ""),
            f"{arms[GRPO]['base_score']:.3f}",
            *(_with_interval(arms[name]) for name in (GRPO, RECIPE)),
            "–" if (found := share(arms, RECIPE)) is None else percent(found),
            *(f"{_score(arms[name]):.3f}" for name in (CONTROLLED, PLAIN)),
            " / ".join(f"{_score(arms[name]):.3f}" for name in IMITATION),
            f"{arms[RECIPE]['ess_mean']:.2f}",
        )
        for task, arms in tasks.items()
    ]
    return (
        f"{markdown_table(headers, rows)}\n\n4,096 rollouts each, one base and one set of held-out problems per task; mean of "
        "seeds with Student's 95 % interval. The settings were chosen on the tasks marked, with other seeds, and then frozen."
    )


def _with_interval(entry: Entry) -> str:
    low, high = entry["score"]["ci95"]
    return f"{_score(entry):.3f} [{low:.3f}, {high:.3f}]"


def plot(data: Data, path: Path) -> None:
    """The arms' scores, task by task."""
    tasks = by_task(data, ASKED, SEEDS)
    with drawing.axes(path, xlabel="", ylabel="held-out score at T = 1", width=8.0) as axes:
        for name, label, colour, mark in (
            (GRPO, "GRPO-8, 64 samplings", drawing.GREY, "_"),
            (RECIPE, "recipe, 4 samplings", drawing.BLUE, "o"),
            (PLAIN, "plain DPO, 4 samplings", drawing.RED, "x"),
        ):
            size = 22 if mark == "_" else 6
            axes.plot(list(tasks), [_score(arms[name]) for arms in tasks.values()], mark, color=colour, ms=size, label=label)
        best = [_score(imitation(arms)) for arms in tasks.values()]
        axes.plot(list(tasks), best, "s", color=drawing.GREEN, ms=4, label="imitation, the best of four")
        axes.tick_params(axis="x", labelrotation=45)
        axes.set_ylim(0, 1.02)


R13 = Claim(
    id="R13",
    title="Four rounds of the recipe do what GRPO does that samples before each step",
    threshold=f"on each task at equal rollouts ≥ {percent(NEEDED)} of GRPO-8's gain, mean of ≥ {SEEDS} seeds; not below "
    "imitation where imitation stays below GRPO",
    command=COMMAND,
    judge=judge,
    plot=plot,
    results="few_rounds",
)
