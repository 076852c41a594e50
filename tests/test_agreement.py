"""Krippendorff's alpha against the values of its author, and what it must be by its meaning."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairloop.loop.raters import agreement
from pairloop.statistics import krippendorff_alpha
from pairloop.store.queue import Vote
from pairloop.types import Label

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): examples A, B and C, a line per observer.
BINARY = ("0100000010", "1110010000")
NOMINAL = ("aabbdcccedda", "babbbccceddd")
WITH_GAPS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def units(lines: tuple[str, ...]) -> list[list[str]]:
    return [[label for label in column if label != "."] for column in zip(*lines, strict=True)]


@pytest.mark.parametrize(("lines", "alpha"), [(BINARY, 0.095), (NOMINAL, 0.692), (WITH_GAPS, 0.743)])
def test_alpha_is_what_its_author_says(lines: tuple[str, ...], alpha: float) -> None:
    assert krippendorff_alpha(units(lines)) == pytest.approx(alpha, abs=5e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=4), max_size=12), st.randoms(use_true_random=False))
def test_alpha_is_one_at_most_and_blind_to_order_and_names(found: list[list[str]], rng: random.Random) -> None:
    alpha = krippendorff_alpha(found)
    assert alpha is None or alpha <= 1
    mixed = [["xyz"["abc".index(label)] for label in rng.sample(unit, len(unit))] for unit in rng.sample(found, len(found))]
    assert krippendorff_alpha([*mixed, ["x"]]) == pytest.approx(alpha)  # who is alone says nothing


def test_alpha_of_coins_is_about_nothing_and_of_one_mind_is_not_known() -> None:
    rng = random.Random(1)
    coins = [[rng.choice("ab") for _ in range(3)] for _ in range(2_000)]
    assert krippendorff_alpha(coins) == pytest.approx(0, abs=0.03)
    assert krippendorff_alpha([unit[:1] * 3 for unit in coins]) == 1
    assert krippendorff_alpha([["a", "a"]] * 9) is None
    assert krippendorff_alpha([]) is None


def test_percent_agreement_leaves_skips_and_single_votes_out() -> None:
    said = {"g1": "AAB", "g2": "AA", "g3": "AS", "g4": "B"}
    labels = {"A": Label.A, "B": Label.B, "S": Label.SKIP}
    votes = [Vote(group, f"r{n}", labels[letter]) for group, letters in said.items() for n, letter in enumerate(letters)]
    found = agreement(votes)
    assert found is not None
    assert found.rate.mean == pytest.approx((1 / 3 + 1) / 2)
    assert (found.rate.n, found.picks) == (2, 5)
    assert agreement(votes[-3:]) is None
