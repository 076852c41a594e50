"""The worst slice: nobody's questions may be answered worse because everybody else's are answered better."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from pairloop.config import GateSection
from pairloop.loop.gate.count import CHAMPION, count
from pairloop.loop.gate.evidence import win_rate
from pairloop.types import DuelPick, Reason


def worst_slice(duel_votes: Sequence[DuelPick], config: GateSection) -> Reason | None:
    """The slice with the lowest win rate, and whether the champion is shown to be better in any; None where none is asked for.

    Each of the S slices seen gets alpha / S, so that all together err in at most alpha of duels. A required look is open until
    every slice seen has ``min_slice_picks`` decisive votes, for one that was hardly asked has shown nothing.
    """
    if not config.slices:
        return None
    by_slice: dict[tuple[str, str], list[DuelPick]] = defaultdict(list)
    for vote in duel_votes:
        for one in vote.slices:
            by_slice[one].append(vote)
    if not by_slice:
        text = f"no vote carries the metadata {', '.join(config.slices)}"
        return Reason("worst_slice", None if "worst_slice" in config.require else True, text)
    counts = {one: count(votes, config) for one, votes in by_slice.items()}
    rates = {one: win_rate(counted.tally.wins, counted.tally.decisive) for one, counted in counts.items()}
    worst = min(rates, key=lambda one: (rates[one].hi, one))
    rate, needed = rates[worst], math.log(len(counts) / config.alpha)
    text = f"lowest of {len(counts)} slices: {worst[0]} = {worst[1]}, won {rate.mean * 100:.0f} % of {rate.n} decisive votes "
    text += f"(95 % interval {rate.lo * 100:.0f}–{rate.hi * 100:.0f} %)"
    failed = [
        one
        for one, counted in counts.items()
        if counted.tally.decisive >= config.min_slice_picks and counted.log_e_value(CHAMPION) >= needed
    ]
    if failed:
        named = ", ".join(f"{key} = {value}" for key, value in failed)
        return Reason("worst_slice", False, f"{text}; the champion is better where {named}", rate.mean, 0.5)
    thin = [f"{key} = {value}" for (key, value), one in rates.items() if one.n < config.min_slice_picks]
    if thin and "worst_slice" in config.require:
        text += f"; fewer than {config.min_slice_picks} decisive votes where {', '.join(thin)}"
        return Reason("worst_slice", None, text, rate.mean, 0.5)
    return Reason("worst_slice", True, text, rate.mean, 0.5)
