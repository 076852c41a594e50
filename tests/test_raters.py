"""Raters: who is flagged and who is not, how often picks are flipped, and what quarantine changes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection
from tests.loop_rig import Rig, better, open_rig
from tests.loop_rig import settings as rig_settings
from tests.test_cli import run, run_json

from pairloop.errors import ConflictError, NotFoundError
from pairloop.loop import cycle, pairs, raters
from pairloop.loop.raters import Observed, check, flip_rate
from pairloop.statistics import binomial_p, holm
from pairloop.store import audit, duels, feedback, groups, quarantines
from pairloop.store.quarantines import Action
from pairloop.types import Label, Pool, VerdictKind


def picks(
    rater: str,
    n: int,
    *,
    first: float = 0.5,
    longer: float = 0.5,
    challenger: float | None = None,
    instant: bool = False,
    seed: int = 0,
) -> list[Observed]:
    rng = random.Random(f"{rater}/{seed}")
    return [
        Observed(
            rater,
            rng.random() < first,
            rng.random() < longer,
            None if challenger is None else rng.random() < challenger,
            instant,
            f"{rater}/{i}",
            "a",
            "b",
        )
        for i in range(n)
    ]


def crowd(n: int, seed: int = 0) -> list[Observed]:
    return [pick for i in range(n) for pick in picks(f"honest-{i}", 40, challenger=0.55, seed=seed)]


# --- the mathematics


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.data())
def test_binomial_p_is_exact(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low = sum(comb(n, i) for i in range(k + 1)) / 2**n
    high = sum(comb(n, i) for i in range(k, n + 1)) / 2**n
    assert binomial_p(k, n) == pytest.approx(min(1.0, 2 * min(low, high)), rel=1e-9)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_flatters(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(before <= after <= 1 for before, after in zip(values, adjusted, strict=True))
    ranked = sorted(zip(values, adjusted, strict=True))
    assert [after for _, after in ranked] == sorted(adjusted)


# --- who is flagged


@pytest.mark.parametrize(
    ("odd", "flag"),
    [
        (picks("odd", 60, first=0.95), "side_bias"),
        (picks("odd", 60, longer=1.0), "length_outlier"),
        (picks("odd", 60, challenger=1.0), "duel_outlier"),
        (picks("odd", 20, instant=True), "instant_picks"),
    ],
)
def test_an_odd_rater_among_many_is_flagged_for_what_is_odd(odd: list[Observed], flag: str) -> None:
    found = {one.rater_id: one.flags for one in check(crowd(50) + odd)}
    assert found.pop("odd") == (flag,)
    assert not any(found.values())


def test_honest_raters_are_flagged_in_about_one_crowd_of_a_hundred() -> None:
    flagged = sum(any(one.flags for one in check(crowd(40, seed))) for seed in range(30))
    assert flagged <= 2
    unadjusted = sum(
        any(
            binomial_p(share.k, share.n, share.expected) < 0.01
            for one in check(crowd(40, seed))
            for share in one.shares.values()
        )
        for seed in range(10)
    )
    assert unadjusted >= 4  # the planted fault: without the adjustment most crowds would have someone


def test_a_few_picks_say_nothing() -> None:
    (one,) = check(picks("new", 9, first=1.0, longer=1.0, instant=True))
    assert (one.picks, one.shares, one.flags) == (9, {}, ())


# --- flips


def asked_twice(n: int, flips: float, seed: int) -> list[Observed]:
    rng = random.Random(seed)
    found = []
    for i in range(n):
        liked = rng.choice(["a", "b"])
        for first in ("a", "b"):
            chosen = liked if rng.random() >= flips else {"a": "b", "b": "a"}[liked]
            found.append(Observed(f"r{i % 9}", chosen == first, None, None, False, f"q{i}", chosen, first))
    return found


@pytest.mark.parametrize("flips", [0.0, 0.1, 0.25])
def test_the_flip_rate_is_found_again(flips: float) -> None:
    found = flip_rate(asked_twice(3_000, flips, 1))
    assert found is not None
    assert found.pairs == 3_000
    assert found.rate.mean == pytest.approx(flips, abs=0.02)
    assert found.rate.lo <= flips <= found.rate.hi
    assert found.label_smoothing == round(found.rate.mean, 3)


def test_its_interval_covers_and_a_coin_smooths_below_one_half() -> None:
    covered = sum(
        found is not None and found.rate.lo <= 0.15 <= found.rate.hi
        for found in (flip_rate(asked_twice(200, 0.15, s)) for s in range(200))
    )
    assert 180 <= covered <= 199
    coin = flip_rate(asked_twice(400, 0.5, 2))
    assert coin is not None
    assert coin.label_smoothing < 0.5


def test_only_the_same_question_with_the_sides_swapped_counts() -> None:
    one, other = asked_twice(1, 0.0, 3)
    assert flip_rate([one]) is None
    assert flip_rate([one, replace(other, first=one.first)]) is None
    assert flip_rate([one, replace(other, rater_id="someone else")]) is None
    assert flip_rate([one, replace(other, chosen=None)]) is None


# --- quarantine, in a store


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(rig_settings(tmp_path)) as made:
        yield made


def by_one(rig: Rig, rater: str, work: Callable[[], None]) -> None:
    """Whatever ``work`` lets pick is picked by one rater, for the groups of new users."""
    as_before = rig._pick
    rig._pick = lambda group, picker: replace(as_before(group, picker), rater_id=rater)  # type: ignore[method-assign]
    work()
    del rig._pick


def new_pairs(rig: Rig) -> Any:
    return pairs.compile_new(rig.store, None, rig.loop.config, parent=rig.champion)


def test_quarantine_sets_pairs_aside_with_their_reason_and_release_brings_them_back(rig: Rig) -> None:
    rig.serve(40)
    before = new_pairs(rig)
    by_one(rig, "mallory", lambda: rig.serve(20))
    with_mallory = new_pairs(rig)
    effect = raters.preview(rig.store, rig.loop.config, "mallory", Action.QUARANTINE)
    assert effect.picks == 24
    assert effect.pairs == len(with_mallory.compiled.pairs) - len(before.compiled.pairs)
    assert len(new_pairs(rig).compiled.pairs) == len(with_mallory.compiled.pairs)  # a preview changes nothing

    assert raters.decide(rig.store, rig.loop.config, "mallory", Action.QUARANTINE, "always left", actor="test") == effect
    with rig.store.reading() as c:
        (entry,) = audit.list_(c)
    assert (entry.actor, entry.action, entry.subject, entry.reason) == ("test", "quarantine", "rater:mallory", "always left")
    after = new_pairs(rig)
    assert after.compiled.pairs == before.compiled.pairs
    assert after.dropped["quarantined"] == 24
    assert after.counts["feedback_rows"] == after.counts["feedback_used"] + sum(after.dropped.values())
    with rig.store.reading() as c:
        assert [(one.rater_id, one.reason) for one in quarantines.current(c, "bot").values()] == [("mallory", "always left")]
        assert len(feedback.recent(c, "bot", 1_000)) == 72  # nothing is deleted

    raters.decide(rig.store, rig.loop.config, "mallory", Action.RELEASE, "a broken mouse", actor="test")
    assert new_pairs(rig).compiled.pairs == with_mallory.compiled.pairs
    with rig.store.reading() as c:
        assert [one.action for one in quarantines.history(c, "bot")] == [Action.QUARANTINE, Action.RELEASE]


def test_what_cannot_be_quarantined_is_refused(rig: Rig) -> None:
    rig.serve(10)
    with pytest.raises(NotFoundError, match="no feedback of rater 'nobody'"):
        raters.preview(rig.store, rig.loop.config, "nobody", Action.QUARANTINE)
    by_one(rig, "mallory", lambda: rig.serve(5))
    with pytest.raises(ConflictError, match="is not quarantined"):
        raters.decide(rig.store, rig.loop.config, "mallory", Action.RELEASE, "why not", actor="test")
    raters.decide(rig.store, rig.loop.config, "mallory", Action.QUARANTINE, "left", actor="test")
    with pytest.raises(ConflictError, match="is quarantined already"):
        raters.decide(rig.store, rig.loop.config, "mallory", Action.QUARANTINE, "left", actor="test")


def test_quarantine_takes_a_raters_votes_out_of_the_open_duel(rig: Rig) -> None:

    rig.serve(60)
    assert cycle.run(rig.loop, trigger="test").state == "duelling"
    rig.judge(20)
    by_one(rig, "mallory", lambda: rig.judge(1, lambda _rng, a, b: better(_rng, b, a)))
    effect = raters.decide(rig.store, rig.loop.config, "mallory", Action.QUARANTINE, "opposes everybody", actor="test")
    assert effect.duel_before is not None
    assert effect.duel_after is not None
    votes = (effect.duel_before.wins + effect.duel_before.losses, effect.duel_after.wins + effect.duel_after.losses)
    assert votes[0] - votes[1] in (0, 1)  # 0 where both answers were equally good
    standing = cycle.status(rig.store, rig.loop.config).duel
    assert standing is not None
    assert (standing.wins, standing.losses, standing.e_value) == (
        effect.duel_after.wins,
        effect.duel_after.losses,
        effect.duel_after.e_value,
    )


def test_the_desk_sees_side_length_and_duel(rig: Rig) -> None:

    rig.serve(60)
    cycle.run(rig.loop, trigger="test")
    rig.judge(30)
    by_one(rig, "lefty", lambda: rig.judge(30, lambda _rng, _a, _b: Label.A))
    found = raters.look(rig.store, rig.loop.config)
    lefty = found.checked[0]
    assert (lefty.rater_id, lefty.picks) == ("lefty", 30)
    side = lefty.shares["side_bias"]
    assert side.k == side.n > 20
    assert lefty.flags[0] == "side_bias"
    assert 0 < lefty.shares["duel_outlier"].k < lefty.shares["duel_outlier"].n
    assert found.flip_rate is None


# --- by hand


def test_the_verbs(tmp_path: Path) -> None:
    with open_rig(rig_settings(tmp_path)) as rig:
        rig.serve(20)
        by_one(rig, "mallory", lambda: rig.serve(30))
        swapped_duplicates(rig, "ann", n=12)
    (tmp_path / "pairloop.toml").write_text('[policy]\nmodel = "fake"\nname = "bot"\n', encoding="utf-8")
    at = ("--config", str(tmp_path))
    listed = run_json("raters", "list", *at)
    assert listed["raters"][0]["rater_id"] == "mallory"
    assert listed["flip_rate"]["pairs"] == 12
    assert "train.label_smoothing = " in run("raters", "list", *at).output
    previewed = run_json("raters", "quarantine", "mallory", "--reason", "x", "--preview", *at)
    assert previewed["done"] is False
    assert run_json("raters", "list", *at)["quarantined"] == []
    done = run("raters", "quarantine", "mallory", "--reason", "clicks blindly", *at)
    assert "rater mallory quarantined: 36 rows of feedback" in done.output
    assert [one["reason"] for one in run_json("raters", "list", *at, "--flagged")["quarantined"]] == ["clicks blindly"]
    again = run("raters", "quarantine", "mallory", "--reason", "x", *at, "--json")
    assert again.exit_code == 2
    assert "already" in json.loads(again.stdout)["error"]["message"]
    assert "rater mallory released" in run("raters", "release", "mallory", "--reason", "sorry", *at).output


def swapped_duplicates(rig: Rig, rater: str, n: int) -> None:
    """The same two answers in both orders, picked by one rater for the better one."""
    rng = random.Random(1)

    def write(c: Connection) -> None:
        asked = groups.recent_prompts(c, "bot", pool=Pool.TRAIN, limit=200)
        differing = [group for group in asked if len({done.text for done in group.completions}) == 2][:n]
        for group in differing:
            for i, answers in enumerate((group.completions, group.completions[::-1])):
                copy = replace(group, group_id=f"{group.group_id}-{i}", completions=answers, created_at=datetime.now(UTC))
                groups.insert(c, copy)
                feedback.insert(c, replace(rig._pick(copy, lambda _r, a, b: better(rng, a, b)), rater_id=rater))

    rig.store.write(write)


# --- the number of the duel, for lifetime spending


def test_each_duel_knows_the_how_manieth_it_is(tmp_path: Path) -> None:

    with open_rig(rig_settings(tmp_path, gate={"spending": "lifetime", "max_picks": 60})) as rig:
        for number in (1, 2):
            rig.serve(60)
            assert cycle.run(rig.loop, trigger="test").state == "duelling"
            with rig.store.reading() as c:
                assert duels.number(c, rig.duel) == number
            status = cycle.status(rig.store, rig.loop.config).duel
            assert status is not None
            assert status.e_needed == pytest.approx(20 * 9.8696 / 6 * number**2, rel=1e-4)
            rig.judge(60)
            done = cycle.run(rig.loop, trigger="test")
            verdict = cycle.status(rig.store, rig.loop.config).last_verdict
            assert verdict is not None
            assert done.state.is_terminal
            assert f"duel {number} of this policy may err" in verdict.verdict.text
            assert verdict.verdict.kind is not VerdictKind.CONTINUE
