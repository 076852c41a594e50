"""What else the gate looks at: the coin, side and length, slices, anchors, and that what is demanded is there."""

from __future__ import annotations

import math
import random
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.test_gate import GOOD, T0, PlainReport, judge

from pairloop.config import GateSection
from pairloop.loop.evaluate import OfflineDuel
from pairloop.loop.gate import Crowd, bradley_terry, coin, decide, simulate
from pairloop.types import DuelPick, Interval, VerdictKind


def crowd(
    n: int, *, win: float = 0.5, first: float = 0.5, side: float = 0.0, length: float = 0.0, longer: float = 1.0, seed: int = 0
) -> list[DuelPick]:
    """Votes with log odds logit(win) ± side/2 + length · log2(length ratio); the challenger is ``longer`` times as long."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        is_first = rng.random() < first
        ratio = longer * 2 ** rng.gauss(0, 0.7)
        odds = math.log(win / (1 - win)) + side * (0.5 if is_first else -0.5) + length * math.log2(ratio)
        won = rng.random() < 1 / (1 + math.exp(-odds))
        made.append(DuelPick(str(i), 1 if won else -1, T0 + timedelta(seconds=i), is_first, ratio))
    return made


def rule(verdict_reasons: object, name: str) -> object:
    return next(reason for reason in verdict_reasons if reason.rule == name)  # type: ignore[attr-defined]


# --- the coin


def test_a_coin_that_is_no_coin_holds_a_duel_that_would_promote() -> None:
    """Challenger always first and people who like the first place: a null wins, and only the coin tells."""
    fooled = crowd(400, first=1.0, side=2.0)
    verdict = judge(fooled)
    assert verdict.kind is VerdictKind.HOLD
    assert "shown first in 400 of 400 votes: not a fair coin" in verdict.text
    blind = [DuelPick(vote.rater_id, vote.outcome, vote.created_at) for vote in fooled]
    assert judge(blind).kind is VerdictKind.PROMOTE  # the planted fault: a gate that does not know the sides


def test_a_fair_coin_is_hardly_ever_suspected_however_often_one_looks() -> None:
    rng = random.Random(5)
    suspected = 0
    for _ in range(200):
        made: list[DuelPick] = []
        for i in range(400):
            made.append(DuelPick(str(i), 1, T0, rng.random() < 0.5))
            if i % 10 == 9:
                found = coin(made)
                assert found is not None
                if found.passed is False:
                    suspected += 1
                    break
    assert suspected <= 2
    assert coin([DuelPick("r", 1, T0)]) is None


# --- side and length


def test_the_adjusted_win_rate_finds_what_was_planted() -> None:
    fitted = bradley_terry(crowd(4_000, win=0.6, side=0.8, length=0.5, longer=1.5, seed=2))
    assert fitted is not None
    assert fitted.win_rate.mean == pytest.approx(0.6, abs=0.03)
    assert fitted.win_rate.lo < 0.6 < fitted.win_rate.hi
    assert math.log(fitted.first_place_odds.mean) == pytest.approx(0.8, abs=0.2)
    assert math.log(fitted.doubled_length_odds.mean) == pytest.approx(0.5, abs=0.15)


def test_its_interval_covers_the_truth() -> None:
    rates = [bradley_terry(crowd(300, win=0.55, side=1.0, length=0.3, seed=seed)) for seed in range(80)]
    covered = sum(rate is not None and rate.win_rate.lo <= 0.55 <= rate.win_rate.hi for rate in rates)
    assert 0.89 <= covered / 80 <= 0.99


def test_a_gain_that_is_only_length_holds_where_more_is_required() -> None:
    longer = crowd(600, win=0.5, length=1.0, longer=2.0, seed=3)
    diagnosed = judge(longer)
    assert diagnosed.kind is VerdictKind.PROMOTE
    assert "win rate at equal length and side" in diagnosed.text
    required = GateSection(require=("adjusted_win_rate",))
    assert judge(longer, required).kind is VerdictKind.CONTINUE
    late = judge(longer, required, hours=25)
    assert late.kind is VerdictKind.HOLD
    assert judge(crowd(600, win=0.65, seed=3), required).kind is VerdictKind.PROMOTE


@settings(max_examples=30, deadline=None)
@given(st.integers(50, 120), st.integers(0, 1_000))
def test_the_fit_survives_votes_that_one_term_tells_apart(n: int, seed: int) -> None:
    separated = [DuelPick(str(i), 1 if i % 2 else -1, T0, i % 2 == 1, 1.0 + (seed % 7)) for i in range(n)]
    fitted = bradley_terry(separated)
    assert fitted is None or all(math.isfinite(value) for value in fitted.win_rate)


# --- slices


def sliced(language: str, wins: int, losses: int) -> list[DuelPick]:
    return [
        DuelPick(f"{language}-{i}", 1 if i < wins else -1, T0 + timedelta(seconds=i), slices=(("language", language),))
        for i in range(wins + losses)
    ]


def test_a_slice_that_got_worse_rejects_what_got_better_on_average() -> None:
    made = sliced("en", 200, 40) + sliced("de", 10, 50)
    assert judge(made).kind is VerdictKind.PROMOTE
    verdict = judge(made, GateSection(slices=("language",)))
    assert verdict.kind is VerdictKind.REJECT
    assert "the champion is better where language = de" in verdict.text


def test_a_required_slice_that_was_hardly_asked_is_open() -> None:
    made = sliced("en", 200, 40) + sliced("de", 6, 4)
    assert judge(made, GateSection(slices=("language",))).kind is VerdictKind.PROMOTE
    open_one = judge(made, GateSection(slices=("language",), require=("worst_slice",)))
    assert open_one.kind is VerdictKind.CONTINUE
    assert "fewer than 30 decisive votes where language = de" in open_one.text
    nothing = judge(crowd(200, win=0.8), GateSection(slices=("language",), require=("worst_slice",)))
    assert nothing.kind is VerdictKind.CONTINUE
    assert "no vote carries the metadata language" in nothing.text


def test_equal_slices_are_hardly_ever_rejected() -> None:
    rng = random.Random(6)
    config = GateSection(slices=("k",), max_picks=10_000)
    rejected = 0
    for _ in range(60):
        made = [
            DuelPick(str(i), rng.choice([1, -1]), T0 + timedelta(seconds=i), slices=(("k", str(rng.randrange(5))),))
            for i in range(400)
        ]
        rejected += any(judge(made[:n], config).kind is VerdictKind.REJECT for n in range(50, 401, 50))
    assert rejected <= 7  # two tests at 5 %, the duel's own and the slices'


# --- what is demanded


@pytest.mark.parametrize(
    ("metric", "interval", "plain", "required"),
    [
        ("seed_win_rate", Interval(0.7, 0.6, 0.8, 64), "PROMOTE", "PROMOTE"),
        ("seed_win_rate", Interval(0.4, 0.3, 0.5, 64), "PROMOTE", "HOLD"),
        ("seed_win_rate", Interval(0.2, 0.1, 0.3, 64), "REJECT", "REJECT"),
        ("verifier_increase", Interval(0.1, 0.01, 0.2, 64), "PROMOTE", "PROMOTE"),
        ("verifier_increase", Interval(0.0, -0.2, 0.2, 64), "PROMOTE", "HOLD"),
        ("verifier_increase", Interval(-0.3, -0.4, -0.2, 64), "REJECT", "REJECT"),
        ("heldout_accuracy", Interval(0.7, 0.6, 0.8, 64), "PROMOTE", "PROMOTE"),
        (None, None, "PROMOTE", "HOLD"),
    ],
)
def test_a_demanded_metric_must_be_shown(metric: str | None, interval: Interval | None, plain: str, required: str) -> None:
    names = {"seed_win_rate": "seed_duel", "verifier_increase": "verifier", "heldout_accuracy": "heldout_accuracy"}
    report = GOOD if metric is None or interval is None else PlainReport({**GOOD.metrics, metric: interval})
    won = [DuelPick(str(i), 1, T0) for i in range(60)]
    demand = GateSection.model_validate({"require": [names.get(metric or "", "seed_duel")]})
    assert decide(report, won, GateSection(), opened_at=T0, now=T0).kind == plain
    verdict = decide(report, won, demand, opened_at=T0, now=T0)
    assert verdict.kind == required
    if metric is None:
        assert "win rate against the base: missing from the report" in verdict.text


def test_an_error_of_what_is_demanded_holds_and_says_why() -> None:
    report = PlainReport(GOOD.metrics, {"seed_win_rate": "the judge is out of reach"})
    verdict = judge_on(report, GateSection(require=("seed_duel",)))
    assert verdict == VerdictKind.HOLD
    assert judge_on(report, GateSection()) == VerdictKind.PROMOTE


def judge_on(report: PlainReport, config: GateSection) -> VerdictKind:
    return decide(report, [DuelPick(str(i), 1, T0) for i in range(60)], config, opened_at=T0, now=T0).kind


def test_a_judge_alone_never_passes_what_is_demanded_and_missing() -> None:
    won = tuple(DuelPick(str(i), 1, T0) for i in range(100))
    duel = OfflineDuel(won, 100, 0, "judge j", flips=20)
    config = GateSection(require=("seed_duel",))
    rules = duel.problems(config.max_judge_flips)
    assert rules[0].text.startswith("judge j contradicted itself on 20 of 100 prompts")
    held = decide(GOOD, won, config, opened_at=T0, now=T0, more_to_come=False, also=rules)
    assert held.kind is VerdictKind.HOLD
    assert decide(GOOD, won, GateSection(), opened_at=T0, now=T0, more_to_come=False, also=rules).kind is VerdictKind.PROMOTE


def test_a_judge_that_mostly_contradicts_itself_decides_nothing() -> None:
    won = tuple(DuelPick(str(i), 1 if i < 60 else 0, T0) for i in range(150))
    rules = OfflineDuel(won, 150, 0, "judge j", flips=90).problems(0.5)
    assert [reason.passed for reason in rules] == [None]
    assert decide(GOOD, won, GateSection(), opened_at=T0, now=T0, more_to_come=False, also=rules).kind is VerdictKind.HOLD
    assert OfflineDuel(won, 150, 0, "verifier v").problems(0.5) == ()


def test_what_cannot_be_demanded_is_refused() -> None:
    with pytest.raises(ValidationError, match="slices names no metadata key"):
        GateSection(require=("worst_slice",))
    with pytest.raises(ValidationError, match="an offline duel has no sides"):
        GateSection(offline=True, require=("sides",))
    with pytest.raises(ValidationError, match="require"):
        GateSection.model_validate({"require": ["luck"]})


# --- sides by coin, in the simulated duels


def test_side_bias_promotes_no_null_while_sides_are_random() -> None:
    biased = simulate(Crowd(0.5, side_bias=1.0), GateSection(), duels=100, picks=1_000, seed=7)
    fixed = simulate(Crowd(0.5, side_bias=1.0, first_share=1.0), GateSection(), duels=50, picks=1_000, seed=7)
    assert sum(end > 0 for end in biased) <= 5
    assert sum(end > 0 for end in fixed) == 50
