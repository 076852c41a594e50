"""Which votes count and what they prove: clustering by rater, the leave-out, spending; with the faults they guard against."""

from __future__ import annotations

import itertools
import math
import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairloop.config import GateSection
from pairloop.loop.gate import CHALLENGER, CHAMPION, Crowd, Staked, count, e_value, simulate, spent
from pairloop.types import DuelPick

T0 = datetime(2026, 1, 5, 8, tzinfo=UTC)
BY_RATER = GateSection(cluster="rater")
ROBUST = GateSection(cluster="rater", robust=0.1)


def votes(*said: tuple[str, int]) -> list[DuelPick]:
    """(rater, outcome) in order, seconds apart."""
    return [DuelPick(rater, outcome, T0 + timedelta(seconds=i)) for i, (rater, outcome) in enumerate(said)]


# --- one vote of several picks


def test_a_raters_picks_are_shares_of_one_bet_by_hand() -> None:
    """Two of three picks won, of at most 2 that count: mean over stakes s of 1 + s · 0 for one rater, 1 + s for the other."""
    config = GateSection(cluster="rater", max_picks_per_rater=2)
    counted = count(votes(("a", 1), ("b", 1), ("a", -1), ("a", -1), ("b", 1)), config)
    assert (counted.tally.wins, counted.tally.losses, counted.tally.raters) == (3, 1, 2)
    assert math.exp(counted.log_e_value()) == pytest.approx(1.5)  # the mean of 1 + s over (0, 1)
    assert math.exp(counted.log_e_value(CHAMPION)) == pytest.approx(0.5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-6, 6), max_size=200), st.lists(st.tuples(st.integers(0, 6), st.floats(0.01, 1)), min_size=1))
def test_a_bet_on_one_more_rater_adds_nothing_on_average_whatever_the_picks_have_in_common(
    nets: list[int], shape: list[tuple[int, float]]
) -> None:
    """Under the null a new rater's wins less losses are k as often as -k: the next e-values then average the present one."""
    staked = Staked(6)
    for net in nets:
        staked.move(0, net)
    here, after = staked.log_e_value, 0.0
    total = sum(weight for _, weight in shape)
    for k, weight in shape:
        for net in (k, -k):
            after += weight / total / 2 * math.exp(_moved(staked, net) - here)
    assert after == pytest.approx(1.0, abs=1e-9)


def _moved(staked: Staked, net: int) -> float:
    one_more = staked.without([])
    one_more.move(0, net)
    return one_more.log_e_value


def test_every_pick_counts_up_to_the_cap() -> None:
    flood = votes(*[("fan", 1)] * 500)
    assert count(flood, GateSection(cluster="pick")).tally.wins == 6
    assert count(flood, GateSection(cluster="pick", max_picks_per_rater=50)).tally.wins == 50
    assert count(flood, BY_RATER).log_e_value() == pytest.approx(math.log(1.5))
    assert count(flood, GateSection()).tally.wins == 1


def test_planted_fault_without_clustering_tastes_promote_a_null() -> None:
    """Raters who differ, at equal odds for either version: their picks are not independent, and a gate that forgets it errs."""
    crowd = Crowd(0.5, taste=0.3, picks_per_rater=50)
    by_pick = GateSection(cluster="pick", max_picks_per_rater=50)
    fooled = sum(end > 0 for end in simulate(crowd, by_pick, duels=60, picks=1_500, seed=1))
    clustered = sum(end > 0 for end in simulate(crowd, BY_RATER, duels=60, picks=1_500, seed=1))
    print(f"null promotions of 60 duels with tastes: {fooled} with every pick a vote, {clustered} by rater")
    assert fooled > 6
    assert clustered <= 2


# --- without the most favourable


def brute_force(said: list[tuple[int, int]], config: GateSection, leave_out: int) -> float:
    """The least evidence for the challenger over all ways to leave so many raters out."""
    least = math.inf
    for kept in itertools.combinations(said, len(said) - leave_out):
        staked = Staked(config.max_picks_per_rater)
        for wins, losses in kept:
            staked.move(0, wins - losses)
        least = min(least, staked.log_e_value)
    return least


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=9), st.integers(0, 3))
def test_those_left_out_are_those_without_whom_the_least_is_left(said: list[tuple[int, int]], leave_out: int) -> None:
    picks = votes(
        *((str(i), outcome) for i, (wins, losses) in enumerate(said) for outcome in [1] * wins + [-1] * losses),
    )
    voted = [one for one in said if sum(one)]
    leave_out = min(leave_out, len(voted))
    counted = count(picks, BY_RATER)
    assert counted.log_e_value(leave_out=leave_out) == pytest.approx(brute_force(voted, BY_RATER, leave_out), abs=1e-9)


def test_a_tenth_of_raters_who_collude_promote_nothing_that_robust_looks_at() -> None:
    crowd = Crowd(0.5, colluders=0.1, picks_per_rater=6)
    watched = sum(end > 0 for end in simulate(crowd, ROBUST, duels=25, picks=1_200, seed=2))
    unwatched = sum(end > 0 for end in simulate(crowd, BY_RATER, duels=25, picks=1_200, seed=2))
    print(f"null promotions of 25 duels with a tenth of colluders: {watched} with robust = 0.1, {unwatched} without")
    assert watched <= 2
    assert unwatched > 15


def test_robust_still_promotes_a_gain() -> None:
    ends = simulate(Crowd(0.65, picks_per_rater=6), ROBUST, duels=60, picks=600, seed=3)
    assert sum(end > 0 for end in ends) >= 56


def test_an_undecided_leave_out_is_open_and_told() -> None:
    from tests.test_gate import judge

    everyone = votes(*((str(i), 1 if i < 65 else -1) for i in range(100)))
    verdict = judge(everyone, GateSection(robust=0.1))
    assert verdict.kind == "CONTINUE"
    robust = next(reason for reason in verdict.reasons if reason.rule == "robust")
    assert robust.passed is None
    assert "without the 10 of 100 raters most favourable to the challenger" in robust.text
    assert robust.observed == pytest.approx(e_value(55, 35))
    assert judge(everyone).kind == "PROMOTE"


# --- the order of adding, and spending


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["pick", "rater_day", "rater"]), st.sampled_from(["drop", "half"]))
def test_counted_votes_never_change(seed: int, cluster: str, ties: str) -> None:
    """The e-process is valid only for a record that grows: what counted after n votes counts after n + 1, in the same place."""
    rng = random.Random(seed)
    config = GateSection.model_validate({"cluster": cluster, "ties": ties, "max_picks_per_rater": 3})
    said = [
        DuelPick(str(rng.randrange(6)), rng.choice([1, -1, 0]), T0 + timedelta(hours=5 * i)) for i in range(rng.randrange(40))
    ]
    for n in range(len(said)):
        before, after = count(said[:n], config).counted, count(said[: n + 1], config).counted
        assert after[: len(before)] == before
        assert len(after) <= len(before) + 1


def test_lifetime_spending_adds_up_to_alpha() -> None:
    lifetime = GateSection(spending="lifetime")
    assert spent(lifetime, 1).alpha == pytest.approx(0.0304, abs=1e-4)
    assert sum(spent(lifetime, r).alpha for r in range(1, 20_000)) == pytest.approx(0.05, abs=1e-5)
    assert spent(GateSection(), 7).alpha == 0.05
    powers = [
        sum(end > 0 for end in simulate(Crowd(0.6), spent(lifetime, r), duels=150, picks=600, seed=4)) / 150 for r in (1, 4)
    ]
    assert powers[0] > powers[1] > 0.7


def test_the_winner_is_who_the_evidence_says() -> None:
    won = count(votes(*((str(i), 1) for i in range(60))), GateSection())
    assert won.winner == CHALLENGER
    assert count(votes(*((str(i), -1) for i in range(60))), GateSection()).winner == CHAMPION
    assert count(votes(*((str(i), 1) for i in range(49))), GateSection()).winner == 0
