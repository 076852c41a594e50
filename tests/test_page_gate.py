"""The gate's pages on a duel as people made it: its verdict, the path of its evidence, its comparisons, hostile ones too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection
from tests.loop_rig import Rig, open_rig, settings
from tests.server import RunningServer
from tests.test_pages import EVIL, Collector

from pairloop.config import GateSection
from pairloop.loop import cycle, gate
from pairloop.loop.cycle import Review
from pairloop.statistics import percent, share
from pairloop.store import cycles, duels, feedback, groups, new_group_id, new_id, quarantines
from pairloop.store.quarantines import Action, Quarantine
from pairloop.types import (
    PREFERENCE_METRIC,
    Completion,
    Cycle,
    CycleState,
    CycleStep,
    DuelPick,
    Feedback,
    Group,
    GroupKind,
    Interval,
    Label,
    Message,
    Pool,
    Reason,
    Source,
    VerdictKind,
)
from pairloop.web.pages import gates
from pairloop.web.pages.gate_rules import figure, rule_of
from pairloop.web.plots import thinned

HOSTILE = (EVIL, "</textarea><b>bold</b>", "x" * 999_999 + "y", "שלום \u202eevil", "broken \ufffd\x07 end")


def newer(_: random.Random, a: Completion, b: Completion) -> Label:
    return Label.A if (a.version or 0) > (b.version or 0) else Label.B


def older(rng: random.Random, a: Completion, b: Completion) -> Label:
    return Label.B if newer(rng, a, b) is Label.A else Label.A


@dataclass(frozen=True)
class World:
    """Three cycles of a real loop: promoted, rejected, nothing to train; with what the page said on the way."""

    rig: Rig
    server: RunningServer
    idle: str
    opened: str
    live: str
    standing: Review

    def text(self, path: str, status: int = 200) -> str:
        return text_of(self.server, path, status)

    def reviewed(self, number: int) -> Review:
        return reviewed(self.rig, number)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("gate")
    limits = {"min_picks": 20, "min_raters": 5, "max_picks": 300, "slices": ("language",)}
    config = settings(folder, gate=limits, evaluate={"prompts": 8})
    with open_rig(config) as rig:
        beside: Any = SimpleNamespace(store=rig.store)
        with RunningServer(folder / "server", config=config, beside=beside) as server:
            idle = text_of(server, "/gates")
            rig.serve(60)
            cycle.run(rig.loop, trigger="test")
            opened = text_of(server, "/gates/1")
            for text in HOSTILE:
                say(rig, (text, text[::-1]), label=Label.A, question=f"{EVIL} {text[:50]}", comment=EVIL)
            rig.judge(12, newer)
            live, standing = text_of(server, "/gates/1"), reviewed(rig, 1)
            rig.judge(40, newer)
            assert cycle.run(rig.loop, trigger="test").state == "promoted"
            rig.serve(60)
            cycle.run(rig.loop, trigger="test")
            rig.judge(40, older)
            assert cycle.run(rig.loop, trigger="test").state == "rejected"
            now = datetime.now(UTC)
            steps = (CycleStep(CycleState.BUILDING, {}, now), CycleStep(CycleState.NOTHING_TO_TRAIN, {"reason": EVIL}, now))
            rig.store.write(lambda c: cycles.insert(c, Cycle("cycle_3", rig.loop.name, 3, 1, "test", now, steps)))
            yield World(rig, server, idle, opened, live, standing)


def text_of(server: RunningServer, path: str, status: int = 200) -> str:
    reply = server.http.get(path)
    assert reply.status_code == status, reply.text
    return reply.text


def reviewed(rig: Rig, number: int) -> Review:
    with rig.store.reading() as c:
        found = cycles.numbered(c, rig.loop.name, number)
        assert found is not None
        return cycle.review(c, rig.loop.config, found)


def say(rig: Rig, texts: tuple[str, str], *, label: Label, question: str = "Why?", comment: str | None = None) -> None:
    """A comparison of the open duel with these texts of champion and challenger."""
    duel, now = rig.duel, datetime.now(UTC)
    answers = tuple(
        Completion(text, version=number) for text, number in zip(texts, (duel.champion, duel.challenger), strict=True)
    )
    prompt = (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", question))
    group = Group(
        new_group_id(),
        rig.loop.name,
        GroupKind.DUEL,
        Pool.GATE,
        prompt,
        answers,
        now,
        user=f"visitor-{new_id('v')}",
        duel_id=duel.duel_id,
        metadata={"language": "de", "tier": "gold"},
    )
    row = Feedback(
        new_id("feedback"),
        group.group_id,
        PREFERENCE_METRIC,
        Source.HUMAN,
        str(group.user),
        now,
        label=label,
        text=comment,
        shown_order=(1, 0),
        latency_ms=4_200,
    )

    def write(c: Connection) -> None:
        groups.insert(c, group)
        feedback.insert(c, row)

    rig.store.write(write)


def test_an_idle_gate_says_what_it_waits_for(world: World) -> None:
    assert "The gate has not spoken yet" in world.idle
    assert 'href="/home"' in world.idle
    assert "no cycle 9 of bot" in world.text("/gates/9", 404)


def test_an_open_duel_is_shown_as_it_stands_and_looks_again(world: World) -> None:
    assert "Nobody has preferred the champion" in world.opened
    assert 'hx-trigger="loop:tick from:body throttle:3s, loop:moved from:body"' in world.opened
    found = world.standing
    assert found.is_open
    assert found.verdict is not None
    assert found.path[-1].e_value == found.verdict.e_value
    assert "as it stands now" in world.live
    assert f"{found.verdict.wins} · {found.verdict.losses} · {found.verdict.ties}" in world.live
    assert f"n = {len(found.path)} votes that count" in world.live


def test_hostile_comparisons_stay_text_side_by_side(world: World) -> None:
    for page in (world.live, world.text("/gates/1")):
        assert EVIL not in page
        assert "</textarea>" not in page
        assert "&lt;/textarea&gt;&lt;b&gt;bold" in page
        assert "and 996,000 more characters" in page
        assert len(page) < 400_000
        tags = Collector(page).tags
        assert not [name for _, attributes in tags for name in attributes if name.startswith("on") or name == "style"]
        assert sum(attributes.get("class") == "answer chosen" for _, attributes in tags) == 5
        words = (
            "Champion @0",
            "Challenger @1",
            "picked @0 after 4.2 s",
            "The conversation before, 2 turns",
            "shown second, picked",
        )
        assert [word for word in words if word not in page] == []
        assert "gold" not in page  # no key that the gate looks at
    assert world.text("/gates/1?show=all&slice=language:de").count('class="compared"') == 5


def test_a_verdict_is_told_rule_by_rule_and_its_path_ends_at_its_evidence(world: World) -> None:
    found = world.reviewed(1)
    assert not found.is_open
    assert found.is_as_judged
    assert found.verdict is not None
    assert found.verdict.kind is VerdictKind.PROMOTE
    assert found.path[found.judged - 1].e_value == found.verdict.e_value
    page = world.text("/gates/1")
    assert '<span class="chip promote">PROMOTE</span>' in page
    assert "loop:tick" not in page
    for reason in found.verdict.reasons:
        assert gate.RULES[reason.rule].meaning in page
        assert escape(reason.text).replace("&#x27;", "&#39;") in page
    counted = gate.count(found.votes, found.config).counted
    first = sum(bool(vote.is_first) for vote in counted)
    assert f"shown first in {first} of {len(counted)} votes" in page
    shown = share(first / len(counted), len(counted))
    assert f"{percent(shown.mean, 1)}<small>95 %: {percent(shown.lo, 1)} to {percent(shown.hi, 1)}</small>" in page
    assert "boundary 1/alpha = 20" in page
    assert page.count('<span class="mark passed">passed</span>') == len(found.verdict.reasons)
    assert "language = de" in page
    won = found.verdict.wins
    assert world.text("/gates/1?show=won&page=2").count('class="compared"') == min(10, won - 10)


def test_the_list_has_a_chip_for_each_cycle_and_pages(world: World) -> None:
    listed = world.text("/gates")
    assert "all rules passed" in listed
    assert [listed.index(f'href="/gates/{number}"') for number in (2, 1)] == sorted(
        listed.index(f'href="/gates/{number}"') for number in (1, 2)
    )
    assert 'href="/gates/3"' not in listed  # it had no verdict
    assert "No verdict HOLD here" in world.text("/gates?kind=HOLD")
    for path in ("/gates?kind=PROMOTE", "/gates?before=2"):
        only = world.text(path)
        assert 'href="/gates/1"' in only
        assert 'href="/gates/2"' not in only


def test_a_rejected_version_points_to_its_own_page(world: World) -> None:
    page = world.text("/gates/2")
    assert "the champion is better" in page
    assert 'can be promoted by hand, with a reason, on <a href="/versions/2">its page</a>' in page


def test_votes_that_are_quarantined_later_are_told_apart_from_what_was_judged(world: World) -> None:
    before = world.reviewed(2)
    assert before.is_as_judged
    (rater, *_) = [one.vote.rater_id for one in before.compared if one.vote is not None and one.vote.outcome < 0]
    quarantine = Quarantine(rater, Action.QUARANTINE, "test", datetime.now(UTC))
    world.rig.store.write(lambda c: quarantines.insert(c, "bot", quarantine))
    try:
        after, page = world.reviewed(2), world.text("/gates/2?show=aside")
    finally:
        release = replace(quarantine, action=Action.RELEASE)
        world.rig.store.write(lambda c: quarantines.insert(c, "bot", release))
    assert after.verdict == before.verdict
    assert not after.is_as_judged
    assert sum(one.vote is None for one in after.compared) == 1
    assert "no longer those that the gate judged" in page
    assert page.count('class="compared"') == 1
    assert world.reviewed(2).is_as_judged


def test_a_cycle_without_a_verdict_says_how_it_ended(world: World) -> None:
    page = world.text("/gates/3")
    assert '<span class="chip nothing_to_train">nothing to train</span>' in page
    assert "&lt;script&gt;" in page
    assert "Rule by rule" not in page


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/gates?kind=MAYBE", "kind"),
        ("/gates?before=0", "before"),
        ("/gates/x", "number"),
        ("/gates/1?show=best", "show"),
        ("/gates/1?page=99", "page"),
        ("/gates/1?slice=tier:gold", "slice"),
    ],
)
def test_a_bad_parameter_is_named(world: World, path: str, name: str) -> None:
    reply = world.server.http.get(path)
    assert reply.status_code == 400
    assert name in reply.text


def test_what_is_read_of_a_duel_gives_the_votes_that_the_whole_rows_give(world: World) -> None:
    with world.rig.store.reading() as c:
        for row in duels.list_(c, "bot"):
            read = list(duels.picks(c, row.duel_id))
            whole = list(duels.picks_about(c, [one.group.group_id for one in read]).values())
            assert gate.votes(row, read, slices=("language",)) == gate.votes(row, whole, slices=("language",))
            mine = sorted((one.group for one in whole), key=lambda group: (group.created_at, group.group_id))
            assert [one.group.group_id for one in read] == [group.group_id for group in mine]
            assert len(read) == duels.count_picks(c, row.duel_id) > 10
            # The planted fault: a group's answers or votes read with its neighbour's would be somebody else's vote.
            shifted = [replace(a, feedback=b.feedback) for a, b in pairwise(read)]
            assert gate.votes(row, shifted) != gate.votes(row, read[:-1])


def test_a_long_duel_draws_steps_of_its_path_and_computes_no_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    found = world.reviewed(1)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    votes = [DuelPick(f"r{i}", 1 if i % 9 < 5 else -1, start + timedelta(seconds=i)) for i in range(2_000)]
    path = gate.path(votes, found.config)
    computed = list[gate.Step]()
    plain = gate.Step.e_value
    monkeypatch.setattr(gate.Step, "e_value", property(lambda step: computed.append(step) or plain.fget(step)))  # type: ignore[func-returns-value, attr-defined]
    drawing = gates.drawing_of(replace(found, path=tuple(path), judged=1_500))
    assert drawing is not None
    assert len(computed) <= 2 * (gates.DRAWN + 1)
    shown = {name: [row for row in drawing.rows if row[0] == name] for name in {row[0] for row in drawing.rows}}
    assert {len(rows) for rows in shown.values()} <= set(range(100, gates.DRAWN + 2))
    for name, value in (("E, for the challenger", "e_value"), ("reversed E, for the champion", "against")):
        last = shown[name][-1]
        counted = gate.count(votes[:1_500], found.config)
        winner = gate.CHALLENGER if value == "e_value" else gate.CHAMPION
        assert last[1:3] == ("1500", f"{gate.e_value_of(counted, winner):.6g}")


@given(st.integers(1, 3_000), st.integers(1, 400))
def test_thinning_keeps_both_ends_and_is_done_once(n: int, most: int) -> None:
    kept = thinned(range(n), most)
    assert (kept[0], kept[-1]) == (0, n - 1)
    assert len(kept) <= most + 1
    assert list(thinned(kept, most)) == list(kept) == sorted(set(kept))


REQUIRED = ("verifier", "heldout_accuracy", "seed_duel")
METRICS = {
    "length_ratio": "length_ratio",
    "entropy_ratio": "entropy_ratio",
    "kl_base": "kl_base",
    "verifier": "verifier_increase",
    "heldout_accuracy": "heldout_accuracy",
    "seed_duel": "seed_win_rate",
}


@dataclass(frozen=True)
class Offline:
    metrics: dict[str, Interval]
    errors: dict[str, str]


@given(
    st.sampled_from(sorted(METRICS)),
    st.lists(st.floats(0.0, 2.0), min_size=3, max_size=3).map(sorted),
    st.booleans(),
)
def test_the_figure_that_a_rule_says_it_compared_decides_it(rule: str, ends: list[float], is_required: bool) -> None:
    """The mean is what was observed, always; the end that is named stands on the side of the threshold that the word says."""
    lo, mean, hi = (round(end, 2) for end in ends)
    config = GateSection.model_validate({"require": REQUIRED if is_required else ()})
    interval = Interval(mean, lo, hi, 90)
    (reason,) = (one for one in gate.guardrails(Offline({METRICS[rule]: interval}, {}), config) if one.rule == rule)
    row = rule_of(reason, interval)
    unit = gate.RULES[rule].unit
    assert row.observed == figure(mean, unit)
    assert row.interval == f"{figure(lo, unit)} to {figure(hi, unit)}"
    if row.what == "both ends":
        assert reason.passed
        return
    compared = {"the lower end": lo, "the upper end": hi}[row.what]
    assert row.compared == figure(compared, unit)
    assert reason.threshold is not None
    is_upper_limit = rule == "kl_base" or (rule == "length_ratio" and row.what == "the upper end")
    holds = compared <= reason.threshold if is_upper_limit else compared >= reason.threshold
    assert holds == (reason.passed is True)


def test_other_rules_say_what_was_compared_too() -> None:
    def what(reason: Reason, interval: Interval | None = None) -> tuple[str, str, str]:
        row = rule_of(reason, interval)
        return row.observed, row.compared, row.what

    assert what(Reason("min_picks", None, "", 12, 20)) == ("12", "", "as observed")
    assert what(Reason("duel", True, "", 31.2, 20), Interval(0.6, 0.5, 0.7, 99)) == ("31.2", "", "as observed")
    assert what(Reason("duel", False, "", 31.2, 20)) == ("31.2", "", "the reversed E, for the champion")
    assert what(Reason("sides", True, "", 0.4, 0.5), Interval(0.4, 0.3, 0.5, 9))[2] == "the evidence against a fair coin"
    looked = Interval(0.62, 0.55, 0.7, 99)
    assert what(Reason("adjusted_win_rate", True, "", 0.55, 0.5), looked) == ("62.0 %", "55.0 %", "the lower end")
    assert what(Reason("adjusted_win_rate", True, "", 0.62), looked) == ("62.0 %", "", "–")  # a diagnostic
    assert what(Reason("seed_duel", True, "", 0.55, 0.5)) == ("–", "55.0 %", "the lower end")  # no interval is known any more
    assert what(Reason("heldout_accuracy", None, "missing")) == ("–", "", "–")
