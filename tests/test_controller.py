"""The round controller: each rule by its own figures, and going on from a saved state."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from pairloop.config import TrainSection
from pairloop.learner.controller import HELDOUT_NEEDED, LEAST_ESS, WINDOW, RoundController, Stop


def controller(**settings: Any) -> RoundController:
    return RoundController(TrainSection(**settings))


def steps(found: RoundController, name: str, values: list[float]) -> Stop | None:
    """Tell of steps with these values of one metric, up to the first stop."""
    rows = ({"ess": 1.0, name: value} for value in values)
    return next((stop for row in rows if (stop := found.after_step(row)) is not None), None)


def looks(found: RoundController, *figures: tuple[float, float], every: int = 4, n: int = 100) -> Stop | None:
    """A look at (loss, d+) before the first step and after each ``every`` steps, up to the first stop."""
    for i, (loss, d_chosen) in enumerate(figures):
        if i:
            assert steps(found, "ess", [1.0] * every) is None
        stop = found.after_heldout({"pair_loss": loss, "d_chosen_per_token": d_chosen, "n": float(n)})
        if stop is not None:
            return stop
    return None


def test_a_round_ends_with_its_last_step() -> None:
    found = controller()
    assert found.after_step({"step": 11, "of": 12, "ess": 1.0}) is None
    stop = found.after_step({"step": 12, "of": 12, "ess": 1.0})
    assert stop is not None
    assert (stop.reason, stop.best_step) == ("completed", None)
    assert "12 steps" in stop.message


@pytest.mark.parametrize(
    ("reason", "settings", "kept", "broken"),
    [
        ("ess", {"stop_ess": 0.5}, 0.51, 0.49),
        ("length_ratio", {"min_length_ratio": 0.8}, 0.81, 0.79),
        ("length_ratio", {"max_length_ratio": 1.25}, 1.24, 1.26),
        ("entropy_ratio", {"min_entropy_ratio": 0.5}, 0.51, 0.49),
    ],
)
def test_each_bound_stops_on_its_far_side_only(reason: str, settings: dict[str, float], kept: float, broken: float) -> None:
    assert steps(controller(**settings), reason, [kept] * 20) is None
    stop = steps(controller(**settings), reason, [broken])
    assert stop is not None
    assert stop.reason == reason
    (key, bound) = next(iter(settings.items()))
    assert f"train.{key} = {bound:g}" in stop.message
    assert f"{broken:.2f}" in stop.message


@pytest.mark.parametrize(
    ("metric", "off"),
    [
        ("ess", {"stop_ess": 0}),
        ("length_ratio", {"min_length_ratio": 0, "max_length_ratio": 0}),
        ("entropy_ratio", {"min_entropy_ratio": 0}),
    ],
)
def test_zero_switches_a_bound_off(metric: str, off: dict[str, int]) -> None:
    assert steps(controller(**off), metric, [1e-3, 50.0, 1e-3]) is None


def test_one_bad_step_does_not_stop_a_round_but_a_bad_window_does() -> None:
    found = controller(stop_ess=0.5)
    assert steps(found, "ess", [1.0] * WINDOW + [0.1]) is None
    stop = steps(found, "ess", [0.1] * WINDOW)
    assert stop is not None
    # 1.0 and 0.1 average below .5 once 5 of the last 8 are bad; the first of them came before.
    assert "0.44 (mean of 8 steps, up to step 13)" in stop.message


def test_old_steps_leave_the_window() -> None:
    """A good start does not cover up for what comes after it: a mean over all steps would stop 80 steps later."""
    stop = steps(found := controller(stop_ess=0.5), "ess", [1.0] * 100 + [0.3] * 100)
    assert stop is not None
    assert found.state["step"] == 106


def test_figures_that_are_missing_or_not_finite_say_nothing() -> None:
    found = controller(stop_ess=0.5)
    for row in ({"ess": math.nan}, {"ess": math.inf}, {}, {"length_ratio": 9.0}, {"entropy_ratio": math.nan, "ess": 0.9}):
        assert found.after_step(row) is None
    assert found.state["window"] == [{"ess": 0.9}]
    assert found.state["step"] == 5


def test_an_estimate_counts_by_the_effective_sample_size_it_was_made_with() -> None:
    """Seen in a real round: at step 33 one completion of 32 held most of the weight, and its length stood for all."""
    usual = {"ess": 0.5, "length_ratio": 1.1, "entropy_ratio": 0.9}
    wild = {"ess": 0.04, "length_ratio": 2.6, "entropy_ratio": 3.3}
    found = controller(max_length_ratio=1.25)
    assert all(found.after_step(usual) is None for _ in range(7))
    assert found.after_step(wild) is None
    # Counted alike, the eight steps would average 1.29.
    assert (7 * usual["length_ratio"] + wild["length_ratio"]) / 8 > 1.25
    stop = steps(found, "length_ratio", [1.5] * WINDOW)
    assert stop is not None
    assert stop.reason == "length_ratio"


def test_estimates_of_next_to_no_effective_sample_decide_nothing() -> None:
    found = controller(max_length_ratio=1.25)
    assert all(found.after_step({"ess": LEAST_ESS - 0.01, "length_ratio": 2.0}) is None for _ in range(20))
    found = controller(max_length_ratio=1.25)
    assert found.after_step({"ess": LEAST_ESS + 0.01, "length_ratio": 2.0}) is not None


def test_low_ess_is_warned_of_once() -> None:
    found = controller(warn_ess=0.8)
    assert steps(found, "ess", [0.9, 0.85]) is None
    assert found.warnings == []
    assert steps(found, "ess", [0.5] * 30) is None
    assert len(found.warnings) == 1
    assert "train.warn_ess = 0.8" in found.warnings[0]


# ---- held-out looks


def test_looks_are_due_before_the_first_step_and_after_every_so_many() -> None:
    found, due = controller(heldout_every=4), []
    for step in range(10):
        due += [step] if found.is_due else []
        found.after_step({"ess": 1.0})
    assert due == [0, 4, 8]
    assert not controller(heldout_every=0).is_due


def test_a_loss_that_rises_twice_in_a_row_stops_with_the_best_weights() -> None:
    found = controller(heldout_every=4)
    stop = looks(found, (0.69, 0.0), (0.60, 0.1), (0.62, 0.2), (0.55, 0.3), (0.57, 0.4), (0.58, 0.5))
    assert stop is not None
    assert (stop.reason, stop.best_step) == ("heldout_loss", 12)
    assert "rose 2 looks in a row, to 0.5800 at step 20" in stop.message
    assert "The weights of step 12 are taken, where it was lowest, at 0.5500" in stop.message


def test_a_loss_that_rises_and_falls_does_not_stop() -> None:
    assert looks(controller(), *[(0.60 - 0.01 * (i % 2), 0.1 * i) for i in range(12)]) is None
    assert looks(controller(stop_heldout_rises=0), *[(0.60 + 0.01 * i, 0.1 * i) for i in range(12)]) is None


def test_a_loss_that_rises_from_the_first_look_on_takes_trained_weights() -> None:
    """The parent's own weights would make a challenger that is the champion."""
    stop = looks(controller(), (0.60, 0.0), (0.61, 0.1), (0.62, 0.2))
    assert stop is not None
    assert stop.best_step == 4


def test_chosen_answers_that_fall_twice_in_a_row_and_far_stop() -> None:
    fall = ((0.60, 0.0), (0.59, 0.3), (0.58, 0.2), (0.57, -0.4))
    stop = looks(controller(), *fall)
    assert stop is not None
    assert (stop.reason, stop.best_step) == ("d_chosen", None)
    assert "to d+ = -0.40 nats per token at step 12, beyond train.max_d_chosen_loss = 0.1" in stop.message
    assert looks(controller(stop_d_chosen_falls=3), *fall) is None
    assert looks(controller(max_d_chosen_loss=0.5), *fall) is None
    falling = [(0.60 - 0.01 * i, -0.1 * i) for i in range(12)]
    assert looks(controller(stop_d_chosen_falls=0), *falling) is None
    assert looks(controller(), *[(loss, -d) for loss, d in falling]) is None


def test_few_heldout_pairs_decide_nothing_and_say_so() -> None:
    found = controller()
    rising = [(0.60 + 0.01 * i, -0.1 * i) for i in range(6)]
    assert looks(found, *rising, n=HELDOUT_NEEDED - 1) is None
    assert [str(HELDOUT_NEEDED - 1) in text for text in found.warnings] == [True]
    assert looks(controller(), *rising, n=HELDOUT_NEEDED) is not None


def test_the_best_weights_are_kept_right_after_their_look_only() -> None:
    found, kept = controller(heldout_every=1), []
    for step, loss in enumerate([0.69, 0.6, 0.5, 0.55, 0.4]):
        if step:
            assert found.after_step({"ess": 1.0}) is None
        assert found.after_heldout({"pair_loss": loss, "d_chosen_per_token": 0.1 * step, "n": 50.0}) is None
        kept += [step] if found.keeps_best else []
    assert kept == [1, 2, 4]
    idle = controller(heldout_every=1, stop_heldout_rises=0)
    idle.after_step({"ess": 1.0})
    idle.after_heldout({"pair_loss": 0.5, "d_chosen_per_token": 0.0, "n": 50.0})
    assert not idle.keeps_best


# ---- going on


@pytest.mark.parametrize("cut", range(0, 24, 3))
def test_a_saved_state_goes_on_as_if_nothing_had_happened(cut: int) -> None:
    settings = TrainSection(stop_ess=0.5, heldout_every=4, stop_heldout_rises=2, stop_d_chosen_falls=0)
    losses = {4: 0.6, 8: 0.5, 12: 0.52, 16: 0.49, 20: 0.51, 24: 0.53}

    def drive(found: RoundController, start: int, end: int) -> Stop | None:
        for step in range(start + 1, end + 1):
            stop = found.after_step({"step": step, "of": 100, "ess": 1 - 0.015 * step, "length_ratio": 1 + 0.005 * step})
            if stop is None and found.is_due:
                stop = found.after_heldout({"pair_loss": losses[step], "d_chosen_per_token": 0.0, "n": 64.0})
            if stop is not None:
                return stop
        return None

    straight, first = RoundController(settings), RoundController(settings)
    wanted = drive(straight, 0, 24)
    assert wanted is not None
    assert (wanted.reason, wanted.best_step) == ("heldout_loss", 16)
    assert drive(first, 0, cut) is None
    second = RoundController(settings, json.loads(json.dumps(first.state, allow_nan=False)))
    assert drive(second, cut, 24) == wanted
    assert second.state == straight.state
