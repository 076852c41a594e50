"""The gate: hand-computed evidence, error control by simulation, and one reason per rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import cache
from math import comb, inf, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairloop.config import GateSection
from pairloop.loop.gate import Tally, count, decide, e_value, log_e_value, picks_to_go, votes, win_rate
from pairloop.types import (
    Completion,
    Duel,
    DuelPick,
    Feedback,
    Group,
    GroupKind,
    Interval,
    Label,
    LabelledGroup,
    Pool,
    Source,
    Verdict,
    VerdictKind,
)

T0 = datetime(2026, 1, 5, 8, tzinfo=UTC)
GATE = GateSection()


@dataclass(frozen=True)
class PlainReport:
    """The part of an offline report that the gate reads."""

    metrics: Mapping[str, Interval]
    errors: Mapping[str, str] = field(default_factory=dict)


GOOD = PlainReport(
    {
        "length_ratio": Interval(1.05, 0.98, 1.12, 64),
        "entropy_ratio": Interval(0.82, 0.75, 0.89, 64),
        "kl_base": Interval(9.0, 7.5, 10.5, 64),
        "bad_share_increase": Interval(0.0, -0.02, 0.02, 64),
    }
)


def with_metric(name: str, mean: float, lo: float, hi: float) -> PlainReport:
    return PlainReport({**GOOD.metrics, name: Interval(mean, lo, hi, 64)})


def picks(wins: int, losses: int, ties: int = 0, *, raters: int | None = None) -> list[DuelPick]:
    """Interleaved votes, each of its own rater (or spread over ``raters``), a second apart."""
    outcomes = [1] * wins + [-1] * losses + [0] * ties
    return [
        DuelPick(f"rater-{i if raters is None else i % raters}", outcome, T0 + timedelta(seconds=i))
        for i, outcome in enumerate(outcomes)
    ]


def judge(duel_votes: Sequence[DuelPick], config: GateSection = GATE, *, hours: float = 1.0) -> Verdict:
    return decide(GOOD, duel_votes, config, opened_at=T0, now=T0 + timedelta(hours=hours))


# --- the e-value


def exact(wins: int, losses: int) -> Fraction:
    """2^{n+1} B(W+1, L+1) P(Bin(n+1, 1/2) <= W), in integers."""
    n = wins + losses
    beta = Fraction(1, (losses + 1) * comb(n + 1, wins))
    return beta * sum(comb(n + 1, k) for k in range(wins + 1))


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (0, 0, 1.0),  # no evidence
        (1, 0, 1.5),  # 2 * integral of 2p over (1/2, 1)
        (0, 1, 0.5),
        (2, 0, 7 / 3),  # 2 * integral of 4p^2
        (1, 1, 2 / 3),  # 2 * integral of 4p(1-p)
        (7, 0, 31.875),  # 2 * 2^7 / 8 * (1 - 2^-8)
    ],
)
def test_e_value_by_hand(wins: int, losses: int, expected: float) -> None:
    assert e_value(wins, losses) == pytest.approx(expected, rel=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_e_value_is_exact(wins: int, losses: int) -> None:
    ratio = Fraction(e_value(wins, losses)) / exact(wins, losses)
    assert abs(float(ratio - 1)) < 1e-12


def test_e_value_is_stable_for_thousands() -> None:
    for wins, losses in [(2_500, 100), (100, 2_500)]:
        expected = exact(wins, losses)
        assert log_e_value(wins, losses) == pytest.approx(log(expected.numerator) - log(expected.denominator), rel=1e-12)
    assert e_value(20_000, 0) < inf
    with pytest.raises(ValueError, match="negative"):
        e_value(-1, 3)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2_000), st.integers(0, 2_000))
def test_e_value_grows_with_wins_and_is_a_martingale(wins: int, losses: int) -> None:
    here, won, lost = log_e_value(wins, losses), log_e_value(wins + 1, losses), log_e_value(wins, losses + 1)
    assert won > here > lost
    # at a win rate of one half the next pick adds nothing on average
    assert np.logaddexp(won, lost) - log(2) == pytest.approx(here, abs=1e-9)


def test_win_rate_has_wilsons_interval() -> None:
    rate = win_rate(63, 98)
    assert (round(rate.mean, 3), round(rate.lo, 3), round(rate.hi, 3), rate.n) == (0.643, 0.544, 0.731, 98)
    assert win_rate(0, 0) == Interval(0.5, 0.0, 1.0, 0)
    assert win_rate(10, 10).hi == 1.0
    assert win_rate(10, 10).lo == pytest.approx(0.722, abs=5e-4)


# --- error control, by simulation


@cache
def promote_at(longest: int) -> np.ndarray:
    """For each n, the fewest wins with e-value >= 20 (n + 1 where none is enough)."""
    fewest, wins = [], 0
    for n in range(longest + 1):
        while wins <= n and log_e_value(wins, n - wins) < log(20):
            wins += 1
        fewest.append(wins)
    return np.array(fewest)


def promoted(p: float, *, duels: int, longest: int, minimum: int, seed: int) -> float:
    """Share of duels that reach the boundary at any look, looking after every pick."""
    wins = (np.random.default_rng(seed).random((duels, longest)) < p).cumsum(axis=1)
    boundary = promote_at(longest)[1:]
    return float((wins >= boundary)[:, minimum - 1 :].any(axis=1).mean())


def promoted_by_z_test(p: float, *, duels: int, longest: int, every: int, seed: int) -> float:
    """The planted fault: a one-sided 5 % z-test, repeated every ``every`` picks."""
    wins = (np.random.default_rng(seed).random((duels, longest)) < p).cumsum(axis=1)[:, every - 1 :: every]
    n = np.arange(every, longest + 1, every)
    return float(((wins - n / 2) / np.sqrt(n / 4) > 1.645).any(axis=1).mean())


@pytest.mark.parametrize("n", [50, 61, 150, 600])
def test_the_simulated_boundary_is_the_gates_own(n: int) -> None:
    wins = int(promote_at(2_000)[n])
    assert judge(picks(wins, n - wins)).kind is VerdictKind.PROMOTE
    assert judge(picks(wins - 1, n - wins + 1)).kind is VerdictKind.CONTINUE


def test_a_challenger_no_better_is_promoted_in_at_most_five_percent_of_duels() -> None:
    with_minimum = promoted(0.5, duels=2_000, longest=2_000, minimum=GATE.min_picks, seed=1)
    without = promoted(0.5, duels=2_000, longest=2_000, minimum=1, seed=1)
    print(f"null promotions with continuous looking over 2,000 duels: {with_minimum:.4f}, without the minimum {without:.4f}")
    assert with_minimum <= without <= 0.05


def test_a_real_gain_is_promoted() -> None:
    power = promoted(0.6, duels=2_000, longest=600, minimum=GATE.min_picks, seed=2)
    print(f"true win rate .60 promoted by 600 picks: {power:.4f}")
    assert power >= 0.93


def test_planted_fault_a_repeated_z_test_would_be_caught() -> None:
    naive = promoted_by_z_test(0.5, duels=2_000, longest=2_000, every=50, seed=1)
    print(f"null promotions of a z-test looked at every 50 picks: {naive:.4f}")
    assert naive > 0.15


def test_ties_counted_half_keep_the_error() -> None:
    rng = np.random.default_rng(3)
    outcomes = rng.choice([1, -1, 0], size=(2_000, 1_000), p=[0.35, 0.35, 0.3])
    half = (outcomes == 0).cumsum(axis=1) // 2
    wins, losses = (outcomes == 1).cumsum(axis=1) + half, (outcomes == -1).cumsum(axis=1) + half
    assert ((wins >= promote_at(2_000)[wins + losses]).any(axis=1)).mean() <= 0.05


def test_a_fixed_side_with_left_bias_would_promote_a_null() -> None:
    """Why votes go by version and sides by coin: 55 % left picks with the challenger always left pass the gate."""
    rng = np.random.default_rng(4)
    left = rng.random((300, 2_000)) < 0.55
    coin = rng.random((300, 2_000)) < 0.5
    boundary = promote_at(2_000)[1:]
    always_left = (left.cumsum(axis=1) >= boundary)[:, 49:].any(axis=1).mean()
    by_coin = ((left == coin).cumsum(axis=1) >= boundary)[:, 49:].any(axis=1).mean()
    assert always_left > 0.9
    assert by_coin <= 0.05


# --- the rules, one by one


def test_no_promotion_below_the_minimum() -> None:
    early = judge(picks(40, 0))
    assert early.kind is VerdictKind.CONTINUE
    assert "40 decisive picks < 50" in early.text
    few_raters = judge([DuelPick(f"r{i % 20}", 1, T0 + timedelta(days=i // 20, seconds=i)) for i in range(100)])
    assert few_raters.kind is VerdictKind.CONTINUE
    assert "20 raters < 30" in few_raters.text
    assert judge(picks(50, 0)).kind is VerdictKind.PROMOTE


def test_the_reason_is_told_in_words_and_numbers() -> None:
    verdict = judge(picks(65, 33))
    assert verdict.kind is VerdictKind.PROMOTE
    duel = verdict.reasons[0]
    assert duel.text == "challenger won 65 of 98 decisive picks (66 %, 95 % interval 57–75 %), e-value 49 ≥ 20"
    assert duel.passed is True
    assert duel.observed == pytest.approx(e_value(65, 33))
    assert duel.threshold == 20
    assert (verdict.wins, verdict.losses, verdict.ties, verdict.raters) == (65, 33, 0, 98)
    assert {reason.rule for reason in verdict.reasons} >= {"duel", "min_picks", "min_raters", "length_ratio", "kl_base"}


def test_a_worse_challenger_is_rejected() -> None:
    verdict = judge(picks(15, 60))
    assert verdict.kind is VerdictKind.REJECT
    assert "the champion is better" in verdict.text
    assert judge(picks(0, 40)).kind is VerdictKind.CONTINUE  # the minimum protects the challenger too


def test_limits_hold_an_undecided_duel() -> None:
    assert judge(picks(1_000, 999)).kind is VerdictKind.CONTINUE
    full = judge(picks(1_000, 1_000))
    assert full.kind is VerdictKind.HOLD
    assert "undecided after 2000 picks" in full.text
    late = judge(picks(30, 30), hours=24.5)
    assert late.kind is VerdictKind.HOLD
    assert "24.5 hours" in late.text
    assert judge([], hours=25).kind is VerdictKind.HOLD
    over = decide(GOOD, picks(30, 30), GATE, opened_at=T0, now=T0, more_to_come=False)
    assert over.kind is VerdictKind.HOLD
    assert "no more than 60 picks" in over.text
    assert judge(picks(1_200, 800), hours=30).kind is VerdictKind.PROMOTE  # evidence goes before the clock


@pytest.mark.parametrize(
    ("report", "kind", "rule"),
    [
        (with_metric("length_ratio", 1.35, 1.25, 1.45), VerdictKind.REJECT, "length_ratio"),
        (with_metric("length_ratio", 0.72, 0.66, 0.78), VerdictKind.REJECT, "length_ratio"),
        (with_metric("entropy_ratio", 0.3, 0.25, 0.35), VerdictKind.REJECT, "entropy_ratio"),
        (with_metric("kl_base", 80.0, 70.0, 90.0), VerdictKind.REJECT, "kl_base"),
        (with_metric("bad_share_increase", 0.2, 0.1, 0.3), VerdictKind.REJECT, "bad_share_increase"),
        (with_metric("bad_share_increase", 0.06, -0.02, 0.14), VerdictKind.PROMOTE, "bad_share_increase"),
        (PlainReport({k: v for k, v in GOOD.metrics.items() if k != "kl_base"}), VerdictKind.HOLD, "kl_base"),
        (PlainReport(GOOD.metrics, {"entropy_ratio": "the scorer broke"}), VerdictKind.HOLD, "entropy_ratio"),
        (with_metric("length_ratio", float("nan"), float("nan"), float("nan")), VerdictKind.HOLD, "length_ratio"),
        (PlainReport({}), VerdictKind.HOLD, "length_ratio"),
    ],
)
def test_guardrails_go_before_the_duel(report: PlainReport, kind: VerdictKind, rule: str) -> None:
    verdict = decide(report, picks(90, 10), GATE, opened_at=T0, now=T0)
    assert verdict.kind is kind
    if kind is not VerdictKind.PROMOTE:
        assert verdict.wins == 0  # no traffic was looked at
        assert [r.rule for r in verdict.reasons if r.passed is not True] == (
            [rule] if report.metrics else ["length_ratio", "entropy_ratio", "kl_base", "bad_share_increase"]
        )
    if rule in report.errors:
        assert "the scorer broke" in verdict.text


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 60), st.sampled_from(["drop", "half"]), st.floats(0, 48))
def test_exactly_the_declared_verdict(wins: int, losses: int, ties: int, mode: str, hours: float) -> None:
    config = GateSection.model_validate({"ties": mode, "max_picks": 400})
    verdict = judge(picks(wins, losses, ties), config, hours=hours)
    half = ties // 2 if mode == "half" else 0
    raters = wins + losses + (ties if mode == "half" else 0)
    enough = wins + losses >= config.min_picks and raters >= config.min_raters
    better, worse = e_value(wins + half, losses + half) >= 20, e_value(losses + half, wins + half) >= 20
    assert not (better and worse)
    expected = VerdictKind.CONTINUE
    if wins + losses + ties >= 400 or hours >= 24:
        expected = VerdictKind.HOLD
    if enough and worse:
        expected = VerdictKind.REJECT
    if enough and better:
        expected = VerdictKind.PROMOTE
    assert verdict.kind is expected
    assert verdict.kind is not VerdictKind.PROMOTE or all(reason.passed is not False for reason in verdict.reasons)


@settings(max_examples=60, deadline=None)
@given(st.integers(50, 300), st.data())
def test_one_more_win_never_hurts(n: int, data: st.DataObject) -> None:
    wins = data.draw(st.integers(0, n - 1))
    order = [VerdictKind.REJECT, VerdictKind.CONTINUE, VerdictKind.PROMOTE]
    assert order.index(judge(picks(wins + 1, n - wins - 1)).kind) >= order.index(judge(picks(wins, n - wins)).kind)


# --- one vote per rater


def test_one_raters_many_picks_are_one_vote() -> None:
    flood = [DuelPick("fan", 1, T0 + timedelta(seconds=i)) for i in range(500)]
    assert count(flood, GATE).tally == Tally(wins=1, losses=0, ties=0, raters=1)
    next_day = [*flood, DuelPick("fan", -1, T0 + timedelta(days=1))]
    assert count(next_day, GATE).tally == Tally(wins=1, losses=1, ties=0, raters=1)
    assert judge(flood).kind is VerdictKind.CONTINUE


def test_the_first_decisive_pick_of_the_day_counts_and_stays() -> None:
    tie, loss, win = (DuelPick("r", outcome, T0 + timedelta(minutes=i)) for i, outcome in enumerate([0, -1, 1]))
    assert count([tie], GATE).tally == Tally(0, 0, 1, 0)
    assert count([win, loss, tie], GATE).tally == Tally(0, 1, 0, 1)
    assert count([tie, loss, win], GateSection(ties="half")).tally == Tally(0, 0, 1, 1)


def test_picks_to_go_follows_the_win_rate() -> None:
    assert picks_to_go(Tally(30, 20, 0, 40), GATE) == pytest.approx(204, abs=60)
    assert picks_to_go(Tally(25, 25, 0, 50), GATE) == 1_950
    assert picks_to_go(Tally(60, 1, 0, 61), GATE) == 0
    assert picks_to_go(Tally(10, 0, 0, 10), GATE) == 40
    assert picks_to_go(Tally(2, 30, 0, 30), GATE) == 18


# --- from feedback rows to votes


DUEL = Duel("duel_1", "cycle_1", "support-bot", champion=3, challenger=4, opened_at=T0)


def pick_row(group_id: str, label: Label | None, **changes: object) -> Feedback:
    fields: dict[str, object] = {
        "feedback_id": f"feedback_{group_id}_{label}",
        "group_id": group_id,
        "metric": "preference",
        "source": Source.HUMAN,
        "rater_id": f"user-{group_id}",
        "created_at": T0,
        "label": label,
        **changes,
    }
    return Feedback(**fields)  # type: ignore[arg-type]


def shown(
    group_id: str, *rows: Feedback, versions: tuple[int, int] = (3, 4), texts: tuple[str, str] = ("a", "b")
) -> LabelledGroup:
    completions = tuple(Completion(text, (1,), (-0.5,), version) for text, version in zip(texts, versions, strict=True))
    group = Group(group_id, "support-bot", GroupKind.DUEL, Pool.GATE, "hello", completions, T0, user="u", duel_id="duel_1")
    return LabelledGroup(group, rows)


@pytest.mark.parametrize(
    ("label", "versions", "outcome"),
    [
        (Label.A, (3, 4), -1),
        (Label.B, (3, 4), 1),
        (Label.A, (4, 3), 1),
        (Label.B, (4, 3), -1),
        (Label.TIE, (3, 4), 0),
        (Label.BOTH_BAD, (4, 3), 0),
        (Label.SKIP, (4, 3), 0),
    ],
)
def test_a_pick_counts_for_the_version_not_for_the_side(label: Label, versions: tuple[int, int], outcome: int) -> None:
    (vote,) = votes(DUEL, [shown("g", pick_row("g", label), versions=versions)])
    assert (vote.rater_id, vote.outcome, vote.created_at) == ("user-g", outcome, T0)


def test_what_is_no_vote_and_what_is_one_vote() -> None:
    later = T0 + timedelta(minutes=1)
    instant = shown("g1", pick_row("g1", Label.A, latency_ms=200))
    assert votes(DUEL, [instant], min_latency_ms=1_000) == []
    assert len(votes(DUEL, [instant])) == 1
    unblinded = pick_row("g1", Label.B, rater_id="next", created_at=later)
    assert votes(DUEL, [shown("g1", *instant.feedback, unblinded)], min_latency_ms=1_000) == []
    late, early = pick_row("g2", Label.A, rater_id="late", created_at=later), pick_row("g2", Label.B, rater_id="early")
    assert votes(DUEL, [shown("g2", late, early)]) == [DuelPick("early", 1, T0, False, 1.0)]
    assert votes(DUEL, [shown("g3", pick_row("g3", Label.A), texts=("same", "same"))]) == [
        DuelPick("user-g3", 0, T0, False, 1.0)
    ]
    assert votes(DUEL, [shown("g4", pick_row("g4", None, metric="thumbs", value=True))]) == []
    judged = shown("g5", pick_row("g5", Label.B, source=Source.LLM, rater_id="judge"))
    assert votes(DUEL, [judged]) == [DuelPick("u", 1, T0, None, 1.0)]
    other = Duel("duel_2", "cycle_2", "support-bot", 3, 4, T0)
    assert votes(other, [judged]) == []


def test_votes_come_in_the_order_they_were_made() -> None:
    rows = [shown(f"g{i}", pick_row(f"g{i}", Label.B, created_at=T0 + timedelta(seconds=9 - i))) for i in range(3)]
    assert [vote.rater_id for vote in votes(DUEL, rows)] == ["user-g2", "user-g1", "user-g0"]
