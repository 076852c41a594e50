"""How often a pick says the opposite of what was meant, measured where one rater was asked the same again, sides swapped."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pairloop.loop.raters.checks import Observed
from pairloop.statistics import share
from pairloop.types import Interval

MIN_REPEATS = 30
"""Comparisons shown twice from which the measured rate may set label smoothing: with 30 a true .1 is seen within about .07."""
_MAX = 0.49
"""Label smoothing is below one half: there a pick says nothing."""


@dataclass(frozen=True, slots=True)
class FlipRate:
    """``pairs``: questions asked twice; ``disagreements``: answered differently; ``rate``: chance that a pick is flipped."""

    pairs: int
    disagreements: int
    rate: Interval

    @property
    def label_smoothing(self) -> float:
        """What ``train.label_smoothing`` would be for picks like these."""
        return round(min(self.rate.mean, _MAX), 3)


def flip_rate(picks: Sequence[Observed]) -> FlipRate | None:
    """From decisive picks of one rater about the same two answers in both orders; None where there are none.

    If each pick is flipped with chance e, two of them disagree with chance d = 2 e (1 - e), so e = (1 - sqrt(1 - 2 d)) / 2; the
    interval is Wilson's for d, carried over. Each pick is in one pair at most.
    """
    asked: dict[tuple[str, str], list[Observed]] = defaultdict(list)
    for pick in picks:
        if pick.chosen is not None:
            asked[pick.rater_id, pick.question].append(pick)
    pairs = disagreements = 0
    for same in asked.values():
        by_side: dict[str, list[Observed]] = defaultdict(list)
        for pick in same:
            by_side[pick.first].append(pick)
        if len(by_side) == 2:
            for one, other in zip(*by_side.values(), strict=False):
                pairs += 1
                disagreements += one.chosen != other.chosen
    if not pairs:
        return None
    d = share(disagreements / pairs, pairs)
    return FlipRate(pairs, disagreements, Interval(_flips(d.mean), _flips(d.lo), _flips(d.hi), pairs))


def _flips(disagreement: float) -> float:
    return (1 - math.sqrt(max(0.0, 1 - 2 * disagreement))) / 2
