"""R4 and R5 are judged from a comparison's document: met, missed on one task, and too few seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pairloop.lab.claims.comparison import judge_groups, judge_staleness, plot_staleness

GOOD = {
    "offline": 0.4, "dpo_s1": 0.8, "dpo_s10": 0.79, "grpo_8": 0.82, "sft": 0.7,
    "grpo_16": 0.8, "grpo_2": 0.79, "grpo_2_quarter": 0.75, "grpo_2_eighth": 0.6,
}  # fmt: skip


def document(scores: dict[str, float], *, task: str = "sort", seeds: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "arm": arm,
            "task": task,
            "score": {"mean": score, "ci95": [score - 0.01, score + 0.01], "seeds": list(range(seeds))},
            "base_score": 0.3,
            "rollouts": 4_096,
            "ess_mean": 0.9,
            "kl_to_base": 1.0,
            "cpu_s": 3.0,
        }
        for arm, score in scores.items()
    ]


def test_met_on_every_task(tmp_path: Path) -> None:
    data = {"arms": document(GOOD) + document(GOOD, task="style")}
    staleness, groups = judge_staleness(data), judge_groups(data)
    assert (staleness.passed, groups.passed) == (True, True)
    assert "sort: online − GRPO -2.0, s = 10 − online -1.0, offline − online -40.0" in staleness.result
    assert "style: 0.988 at equal rollouts, 0.938 at a quarter, 0.750 at an eighth" in groups.result
    assert "| sort | sft | 0.700 (base 0.300) | 0.690 to 0.710 |" in staleness.details
    plot_staleness(data, tmp_path / "R4.png")
    assert (tmp_path / "R4.png").stat().st_size > 5_000


def test_one_task_that_misses_fails_the_claim_and_is_named() -> None:
    bad = GOOD | {"dpo_s10": 0.7, "grpo_2_quarter": 0.7}
    data = {"arms": document(GOOD) + document(bad, task="style")}
    assert judge_staleness(data).passed is False
    assert "s = 10 − online -10.0 (fails)" in judge_staleness(data).result
    assert judge_groups(data).passed is False


def test_offline_that_keeps_up_fails_the_claim() -> None:
    assert judge_staleness({"arms": document(GOOD | {"offline": 0.75})}).passed is False


def test_too_few_seeds_decide_nothing() -> None:
    data = {"arms": document(GOOD, seeds=2)}
    assert (judge_staleness(data).passed, judge_groups(data).passed) == (None, None)
