"""What is odd about a rater: tests per rater, adjusted for how many raters are tested. They accuse nobody; a person decides.

Nothing here sets a vote aside by itself. Whoever drops the votes of those who disagree bends every duel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pairloop.statistics import binomial_p, holm

LEVEL = 0.01
"""Chance that any honest rater is flagged at all, if all think alike."""
MIN_PICKS = 10
"""Decisive picks from which a rater is tested."""
MAX_INSTANT = 0.5
"""Share of instant picks above which a rater is flagged."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One pick of a person.

    ``place``, ``longer``, ``challenger``: whether the answer in the first place, the longer one, the challenger's was chosen;
    None where that does not apply. ``question`` names prompt and answers whatever their order, ``chosen`` and ``first`` the
    answer that was chosen and the one in the first place.
    """

    rater_id: str
    place: bool | None
    longer: bool | None
    challenger: bool | None
    is_instant: bool
    question: str
    chosen: str | None
    first: str


@dataclass(frozen=True, slots=True)
class Share:
    """``k`` of ``n`` picks; ``expected``: the share that it is compared with; ``p``: adjusted for all tests made."""

    k: int
    n: int
    expected: float
    p: float


@dataclass(frozen=True, slots=True)
class Checked:
    """A rater with the tests that could be made and what they flag."""

    rater_id: str
    picks: int
    instant: int
    shares: Mapping[str, Share]
    flags: tuple[str, ...]


_ASPECTS: Mapping[str, Callable[[Observed], bool | None]] = {
    "side_bias": lambda pick: pick.place,
    "length_outlier": lambda pick: pick.longer,
    "duel_outlier": lambda pick: pick.challenger,
}
"""A fair coin decides the sides, so a side is compared with one half; a taste is compared with that of all others."""


def check(picks: Sequence[Observed]) -> list[Checked]:
    """All raters, those with the most picks first."""
    by_rater: dict[str, list[Observed]] = defaultdict(list)
    for pick in picks:
        by_rater[pick.rater_id].append(pick)
    tested = _adjusted(by_rater)
    found = [_checked(rater, own, tested.get(rater, {})) for rater, own in by_rater.items()]
    return sorted(found, key=lambda one: (-one.picks, one.rater_id))


def _adjusted(by_rater: Mapping[str, Sequence[Observed]]) -> dict[str, dict[str, Share]]:
    """Each rater's shares, with p-values adjusted over all raters and aspects together."""
    raw: list[tuple[str, str, Share]] = []
    for aspect, of in _ASPECTS.items():
        counts = {rater: _count([of(pick) for pick in own]) for rater, own in by_rater.items()}
        all_k, all_n = sum(k for k, _ in counts.values()), sum(n for _, n in counts.values())
        for rater, (k, n) in counts.items():
            if n >= MIN_PICKS and (aspect == "side_bias" or all_n - n >= MIN_PICKS):
                expected = 0.5 if aspect == "side_bias" else (all_k - k + 0.5) / (all_n - n + 1)
                raw.append((rater, aspect, Share(k, n, expected, binomial_p(k, n, expected))))
    adjusted: dict[str, dict[str, Share]] = defaultdict(dict)
    for (rater, aspect, share), p in zip(raw, holm([share.p for *_, share in raw]), strict=True):
        adjusted[rater][aspect] = Share(share.k, share.n, share.expected, p)
    return adjusted


def _count(values: Sequence[bool | None]) -> tuple[int, int]:
    known = [value for value in values if value is not None]
    return sum(known), len(known)


def _checked(rater: str, own: Sequence[Observed], shares: Mapping[str, Share]) -> Checked:
    instant = sum(pick.is_instant for pick in own)
    flags = [aspect for aspect, share in shares.items() if share.p < LEVEL]
    if len(own) >= MIN_PICKS and instant > MAX_INSTANT * len(own):
        flags.append("instant_picks")
    return Checked(rater, len(own), instant, shares, tuple(flags))
