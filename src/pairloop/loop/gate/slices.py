"""The worst slice: nobody's questions may be answered worse because everybody else's are answered better."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pairloop.config import GateSection
from pairloop.loop.gate.count import CHAMPION, count
from pairloop.loop.gate.evidence import win_rate
from pairloop.types import DuelPick, Interval, Reason


@dataclass(frozen=True, slots=True)
class Slice:
    """The votes whose metadata ``key`` has this ``value``. ``is_thin``: too few to have shown anything.

    ``is_worse``: the champion is shown to be better in it.
    """

    key: str
    value: str
    rate: Interval
    ties: int
    is_thin: bool
    is_worse: bool

    @property
    def name(self) -> str:
        return f"{self.key} = {self.value}"


def by_slice(duel_votes: Sequence[DuelPick], config: GateSection) -> list[Slice]:
    """The slices seen, the worst first: that with the lowest upper end of its win rate's interval.

    Each of the S slices seen gets alpha / S, so that all together err in at most alpha of duels.
    """
    votes_of: dict[tuple[str, str], list[DuelPick]] = defaultdict(list)
    for vote in duel_votes:
        for one in vote.slices:
            if one[0] in config.slices:
                votes_of[one].append(vote)
    found = []
    for (key, value), votes in votes_of.items():
        counted = count(votes, config)
        tally, is_thin = counted.tally, counted.tally.decisive < config.min_slice_picks
        is_worse = not is_thin and counted.log_e_value(CHAMPION) >= math.log(len(votes_of) / config.alpha)
        found.append(Slice(key, value, win_rate(tally.wins, tally.decisive), tally.ties, is_thin, is_worse))
    return sorted(found, key=lambda one: (one.rate.hi, one.key, one.value))


def worst_slice(duel_votes: Sequence[DuelPick], config: GateSection) -> Reason | None:
    """The slice with the lowest win rate, and whether the champion is shown to be better in any; None where none is asked for.

    A required look is open until every slice seen has ``min_slice_picks`` decisive votes, for one that was hardly asked has
    shown nothing.
    """
    if not config.slices:
        return None
    slices = by_slice(duel_votes, config)
    if not slices:
        text = f"no vote carries the metadata {', '.join(config.slices)}"
        return Reason("worst_slice", None if "worst_slice" in config.require else True, text)
    worst, rate = slices[0], slices[0].rate
    text = f"lowest of {len(slices)} slices: {worst.name}, won {rate.mean * 100:.0f} % of {rate.n} decisive votes "
    text += f"(95 % interval {rate.lo * 100:.0f}–{rate.hi * 100:.0f} %)"
    worse = [one.name for one in slices if one.is_worse]
    if worse:
        return Reason("worst_slice", False, f"{text}; the champion is better where {', '.join(worse)}", rate.mean, 0.5)
    thin = [one.name for one in slices if one.is_thin]
    if thin and "worst_slice" in config.require:
        text += f"; fewer than {config.min_slice_picks} decisive votes where {', '.join(thin)}"
        return Reason("worst_slice", None, text, rate.mean, 0.5)
    return Reason("worst_slice", True, text, rate.mean, 0.5)
