"""R6, R8 and R13 are judged from their figures alone; rank correlation by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.test_lab_claims_comparison import document

from pairloop.lab.claims import few_rounds, one_off, rounds, staleness
from pairloop.statistics import spearman

# --- rank correlation


def test_rank_correlation_by_hand() -> None:
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert spearman([1, 2, 3, 4], [20, 10, 40, 30]) == pytest.approx(0.6)
    # ties share their ranks: 1, 2.5, 2.5 against 1, 2, 3
    assert spearman([1, 5, 5], [1, 2, 3]) == pytest.approx(0.8660254)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=30, unique=True))
def test_rank_correlation_sees_order_and_nothing_else(values: list[int]) -> None:
    assert spearman(values, [value**3 for value in values]) == pytest.approx(1)
    assert spearman(values, [-value for value in values]) == pytest.approx(-1)


# --- R6


def grid(scores: dict[str, float]) -> dict[str, Any]:
    ess = dict(zip(staleness.REFRESH, (1.0, 0.95, 0.85, 0.7, 0.5, 0.4), strict=True))
    rows: list[dict[str, Any]] = [
        {"task": task, "arm": arm, "learning_rate": rate, "ess": ess[arm] - rate, "score": scores[arm] - rate, "scores": []}
        for task in ("sort", "brackets")
        for rate in (0.001, 0.002)
        for arm in staleness.REFRESH
    ]
    return {"rollouts": 64, "seeds": [0, 1, 2], "rows": rows}


def test_r6_passes_where_fresh_arms_win_and_fails_where_they_lose(tmp_path: Path) -> None:
    falling = dict(zip(staleness.REFRESH, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), strict=True))
    outcome = staleness.judge(grid(falling))
    assert (outcome.passed, "sort 1.00 (12 cells), brackets 1.00" in outcome.result) == (True, True)
    assert "| sort | offline | 0.399 (ESS 0.40) | 0.398 (ESS 0.40) |" in outcome.details
    rising = dict(zip(staleness.REFRESH, (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), strict=True))
    assert staleness.judge(grid(rising)).passed is False
    staleness.plot(grid(falling), tmp_path / "R6.png")
    assert (tmp_path / "R6.png").stat().st_size > 5_000


# --- R7


def of_one_off(free: list[list[float]], ends: list[float]) -> dict[str, Any]:
    rows = [
        {"arm": "one_off", "seed": seed, "steps": 400, "stop": "completed", "scores": scores}
        for seed, scores in enumerate(free)
    ]
    rows += [
        {"arm": "one_off_controlled", "seed": seed, "steps": 120, "stop": "d_chosen", "scores": [0.6, end]}
        for seed, end in enumerate(ends)
    ]
    return {"task": "caesar", "learning_rate": 1e-4, "problems": 500, "rows": rows}


HUMP = [[0.6, 0.8, 0.86, 0.7, 0.6], [0.6, 0.81, 0.84, 0.72, 0.61], [0.6, 0.8, 0.85, 0.7, 0.6]]


def test_r7_sees_the_hump_and_the_stop(tmp_path: Path) -> None:
    data = of_one_off(HUMP, [0.82, 0.83, 0.8])
    outcome = one_off.judge(data)
    assert outcome.passed is True, outcome.result
    assert "0.600 → 0.850 (step 200) → 0.603 (step 400), 24.7 [" in outcome.result
    assert "rounds end at 0.817 (lowest 0.800, 94 % of the peak)" in outcome.result
    assert "d_chosen at step 120, d_chosen at step 120" in outcome.details
    one_off.plot(data, tmp_path / "R7.png")
    assert (tmp_path / "R7.png").stat().st_size > 5_000


def test_r7_fails_without_a_hump_and_by_one_seed_that_stops_too_late() -> None:
    rising = [[0.6, 0.7, 0.75, 0.8, 0.86], [0.6, 0.7, 0.76, 0.8, 0.85]]
    assert one_off.judge(of_one_off(rising, [0.85, 0.85])).passed is False
    assert one_off.judge(of_one_off(HUMP, [0.82, 0.83, 0.75])).passed is False


# --- R8


def of_rounds(*curves: list[float]) -> dict[str, Any]:
    rows = [{"task": "support", "seed": seed, "scores": list(curve)} for seed, curve in enumerate(curves)]
    return {"arm": "recipe", "problems": 1_000, "rows": rows}


def test_r8_asks_three_rounds_to_pay_and_forgives_the_fourth(tmp_path: Path) -> None:
    good = of_rounds([0.4, 0.6, 0.7, 0.75, 0.74], [0.4, 0.61, 0.7, 0.74, 0.75], [0.4, 0.6, 0.71, 0.75, 0.73])
    outcome = rounds.judge(good)
    assert outcome.passed is True
    assert "support: +20.3 [" in outcome.result
    assert "| support | 0.400 | 0.603 | 0.703 | 0.747 | 0.740 |" in outcome.details
    rounds.plot(good, tmp_path / "R8.png")
    assert (tmp_path / "R8.png").stat().st_size > 5_000


@pytest.mark.parametrize("third", [[0.70, 0.70, 0.71], [0.65, 0.66, 0.66], [0.95, 0.72, 0.6]])
def test_r8_fails_where_a_round_adds_nothing_certain(third: list[float]) -> None:
    assert rounds.judge(of_rounds(*([0.4, 0.6, 0.7, score, 0.9] for score in third))).passed is False


# --- R13

SCORES = {
    "grpo_8": 0.8, "recipe": 0.79, "recipe_controlled": 0.78, "rounds_4": 0.4,
    "rounds_4_sft": 0.5, "rounds_4_sft_8": 0.7, "rounds_4_sft_32": 0.6, "rounds_4_sft_64": 0.55,
}  # fmt: skip


def test_r13_passes_at_95_percent_of_the_gain(tmp_path: Path) -> None:
    data = {"arms": document(SCORES, seeds=5) + document(SCORES, task="cipher", seeds=5)}
    outcome = few_rounds.judge(data)
    assert outcome.passed is True
    assert "the recipe's part of GRPO's gain: sort 98 %, cipher 98 %; below 95 % on none" in outcome.result
    assert "imitation stays below GRPO on sort, cipher, and above the recipe there on none" in outcome.result
    row = "| sort (tuned on) | 0.300 | 0.800 [0.790, 0.810] | 0.790 [0.780, 0.800] | 98 % | 0.780 | 0.400 | "
    assert f"{row}0.500 / 0.700 / 0.600 / 0.550 | 0.90 |" in outcome.details
    few_rounds.plot(data, tmp_path / "R13.png")
    assert (tmp_path / "R13.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": 0.77}, "below 95 % on cipher"),
        ({"recipe": 0.785, "rounds_4_sft_32": 0.79}, "above the recipe there on cipher"),
        ({"grpo_8": 0.3}, "cipher no gain to share"),
    ],
)
def test_r13_fails_by_one_task_and_names_it(changes: dict[str, float], said: str) -> None:
    outcome = few_rounds.judge({"arms": document(SCORES, seeds=5) + document(SCORES | changes, task="cipher", seeds=5)})
    assert (outcome.passed, said in outcome.result) == (False, True), outcome.result


def test_r13_lets_imitation_win_where_it_beats_grpo_too() -> None:
    assert few_rounds.judge({"arms": document(SCORES | {"rounds_4_sft_8": 0.9}, seeds=5)}).passed is True


def test_r13_needs_five_seeds() -> None:
    assert few_rounds.judge({"arms": document(SCORES, seeds=4)}).passed is None
