"""The path of a duel's evidence, the slices in their order, and a sentence for each rule."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_gate import GOOD, T0, PlainReport

from pairloop.config import GateSection
from pairloop.loop.evaluate import OfflineDuel
from pairloop.loop.gate import CHAMPION, RULES, by_slice, count, decide, e_value_of, interval_of, judged, path
from pairloop.types import DuelPick, Interval, Reason, Verdict, VerdictKind

SETTINGS = (
    GateSection(),
    GateSection(cluster="pick", ties="half"),
    GateSection(cluster="rater", max_picks_per_rater=3),
    GateSection(cluster="rater", ties="half", robust=0.1),
)
picks = st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1, -1, 0])), max_size=60)


def made(said: list[tuple[int, int]], **more: Any) -> list[DuelPick]:
    return [DuelPick(f"rater-{who}", outcome, T0 + timedelta(hours=i), **more) for i, (who, outcome) in enumerate(said)]


@settings(max_examples=60, deadline=None)
@given(picks, st.sampled_from(SETTINGS), st.randoms(use_true_random=False))
def test_the_path_leads_to_the_verdict_and_through_every_verdict_before(
    said: list[tuple[int, int]], config: GateSection, rng: Any
) -> None:
    votes = made(said)
    shuffled = rng.sample(votes, len(votes))
    steps = path(shuffled, config)
    verdict = decide(GOOD, votes, config, opened_at=T0, now=T0)
    assert len(steps) == judged(verdict, config)
    assert [step.votes for step in steps] == list(range(1, len(steps) + 1))
    assert (steps[-1].e_value if steps else 1.0) == verdict.e_value
    for step in steps:
        counted = count([vote for vote in votes if vote.created_at <= step.at], config)
        assert (step.e_value, step.against) == (e_value_of(counted), e_value_of(counted, CHAMPION))


def test_a_path_in_another_order_would_be_another_path() -> None:
    """The planted fault: by the picks' outcome, not their time, the evidence would seem to be there long before."""
    votes = made([(i, 1 if i % 4 else -1) for i in range(60)])
    true = [step.e_value for step in path(votes, GateSection(cluster="pick"))]
    by_outcome = made(sorted([(i, 1 if i % 4 else -1) for i in range(60)], key=lambda one: -one[1]))
    wrong = [step.e_value for step in path(by_outcome, GateSection(cluster="pick"))]
    assert wrong[-1] == true[-1]
    assert max(wrong) > 100 * max(true)


def test_slices_come_with_the_worst_first_and_say_what_they_show() -> None:
    config = GateSection(cluster="pick", slices=("language",), min_slice_picks=20)
    votes = list[DuelPick]()
    for value, wins, losses in (("en", 40, 10), ("de", 5, 45), ("fr", 1, 2)):
        start = len(votes)
        for i in range(wins + losses):
            at = T0 + timedelta(minutes=start + i)
            votes.append(DuelPick(f"{value}-{i}", 1 if i < wins else -1, at, slices=(("language", value), ("tier", "gold"))))
    found = by_slice(votes, config)
    assert [(one.name, one.is_worse, one.is_thin) for one in found] == [
        ("language = de", True, False),
        ("language = fr", False, True),
        ("language = en", False, False),
    ]
    assert by_slice(votes, GateSection()) == []
    verdict = decide(GOOD, votes, config, opened_at=T0, now=T0)
    reason = next(one for one in verdict.reasons if one.rule == "worst_slice")
    assert reason.passed is False
    assert reason.observed == found[0].rate.mean
    assert interval_of("worst_slice", GOOD, verdict, votes, config) == found[0].rate


def test_every_rule_that_the_gate_names_has_a_sentence() -> None:
    config = GateSection(
        require=("sides", "adjusted_win_rate", "worst_slice", "verifier", "seed_duel", "heldout_accuracy", "suite"),
        slices=("language",),
        robust=0.1,
        cluster="rater",
        spending="lifetime",
        min_picks=1,
        max_picks=60,
    )
    metrics = {**GOOD.metrics, "verifier_increase": Interval(0.1, 0, 0.2, 9), "seed_win_rate": Interval(0.6, 0.5, 0.7, 9)}
    metrics |= {"heldout_accuracy": Interval(0.6, 0.5, 0.7, 9), "suite_lost": Interval(0, 0, 0, 9)}
    report = PlainReport(metrics, {})
    votes = [
        DuelPick(str(i), 1 if i % 2 else -1, T0 + timedelta(seconds=i), bool(i % 3), 1.2, (("language", "en"),))
        for i in range(80)
    ]
    verdicts = [
        decide(report, votes, config, opened_at=T0, now=T0 + timedelta(hours=99)),
        decide(report, (), config, opened_at=T0, now=T0, more_to_come=False),
        decide(PlainReport({}, {}), (), config, opened_at=T0, now=T0),
    ]
    problems = OfflineDuel(tuple(votes), 90, 30, "judge", "it failed", flips=70).problems(0.1)
    said = {reason.rule for verdict in verdicts for reason in verdict.reasons} | {reason.rule for reason in problems}
    assert said == set(RULES)
    assert all(rule.meaning.endswith(".") for rule in RULES.values())


@pytest.mark.parametrize(("rule", "mean"), [("duel", 0.75), ("length_ratio", 1.05), ("sides", 0.5), ("min_picks", None)])
def test_a_rule_has_the_interval_of_what_it_looked_at(rule: str, mean: float | None) -> None:
    votes = [DuelPick(str(i), 1 if i % 4 else -1, T0, bool(i % 2)) for i in range(40)]
    verdict = Verdict(VerdictKind.HOLD, (Reason(rule, None, ""),), wins=30, losses=10)
    found = interval_of(rule, GOOD, verdict, votes, GateSection())
    assert found is None if mean is None else found is not None and found.mean == pytest.approx(mean, abs=0.02)


@pytest.mark.parametrize("rule", ["sides", "adjusted_win_rate"])
def test_an_interval_is_of_the_votes_that_count(rule: str) -> None:
    """As what the rule says: one rater's thirty votes of a day are one."""
    votes = [DuelPick(str(i), 1 if i % 4 else -1, T0, bool(i % 2), length_ratio=1 + i % 3) for i in range(60)]
    again = [DuelPick("0", 1, T0 + timedelta(minutes=i), True, length_ratio=2.0) for i in range(1, 31)]
    verdict = Verdict(VerdictKind.HOLD, (), wins=45, losses=15)
    found = interval_of(rule, GOOD, verdict, votes, GateSection())
    assert found is not None
    assert interval_of(rule, GOOD, verdict, votes + again, GateSection()) == found
    assert interval_of(rule, GOOD, verdict, votes + again, GateSection(cluster="pick", max_picks_per_rater=99)) != found
