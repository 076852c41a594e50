"""Intervals of what was counted; standard library only."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from statistics import correlation, fmean, stdev

from pairloop.types import Interval

Z95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


def percent(share: float, digits: int = 0) -> str:
    """A share between 0 and 1 as people read it: ``92 %``."""
    return f"{100 * share:.{digits}f} %"


def share(mean: float, n: int) -> Interval:
    """A share of ``n`` observations with Wilson's 95 % interval, which stays within 0 and 1 and is honest about none of few.

    Wilson 1927. ``mean`` may count ties half. Without observations nothing is known: one half, between 0 and 1.
    """
    if n == 0:
        return Interval(0.5, 0.0, 1.0, 0)
    z2 = Z95**2
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(mean, 0.0 if mean == 0 else centre - half, 1.0 if mean == 1 else centre + half, n)


def binomial_p(k: int, n: int, p: float = 0.5) -> float:
    """How surprising ``k`` of ``n`` is at chance ``p``: twice the smaller exact tail, at most 1."""
    if not 0 < p < 1 or n == 0:
        return 1.0
    low = math.fsum(_binomial(i, n, p) for i in range(k + 1))
    return min(1.0, 2 * min(low, binomial_tail(k, n, p)))


def binomial_tail(k: int, n: int, p: float) -> float:
    """The chance of ``k`` or more of ``n`` at chance ``p``, strictly between 0 and 1."""
    return math.fsum(_binomial(i, n, p) for i in range(k, n + 1))


def _binomial(k: int, n: int, p: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979): rejecting those below a level errs at all in at most that share."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha of nominal labels: 1 is full agreement, 0 what chance gives, below 0 is worse than chance.

    Each unit is the list of what its raters said, however many they were; those with fewer than two say nothing. None where
    nothing can be compared, or where everybody always said the same (there chance would agree, too). Krippendorff 2011.
    """
    totals: Counter[Hashable] = Counter()
    disagreed = 0.0  # observed pairs of different labels within a unit, each unit weighted by its number of raters
    for unit in units:
        m = len(unit)
        if m >= 2:
            counts = Counter(unit)
            totals.update(counts)
            disagreed += (m * m - sum(k * k for k in counts.values())) / (m - 1)
    n = sum(totals.values())
    by_chance = (n * n - sum(k * k for k in totals.values())) / (n - 1) if n > 1 else 0.0
    return 1.0 - disagreed / by_chance if by_chance else None


STAKES = (0.9, 0.6, 0.4, 0.25, 0.16, 0.1, 0.06, 0.04, 0.025, 0.016, 0.01, 0.006, 0.004, 0.0025)
"""How far towards certainty each bet of `log_excess` places the true chance; any fixed list is valid."""


def log_excess(k: float, n: int, p: float) -> float:
    """Log of the evidence that ``k`` of ``n`` is more than chance ``p`` gives, valid however often one looks.

    The mean of bets that each win where the chance is p + (1 - p) s. While it is at most ``p`` at every observation the mean
    never exceeds 1, so (Ville 1939) it ever reaches 1/alpha with a chance of at most alpha. Falls as ``p`` rises. An
    observation may be half of one: the bets are convex, so that it wins no more than one that is as likely as not.
    """
    if p >= 1 or n == 0:
        return -math.inf if n else 0.0
    p = max(p, 1e-12)
    logs = [k * math.log1p((1 - p) * s / p) + (n - k) * math.log1p(-s) for s in STAKES]
    highest = max(logs)
    return highest + math.log(math.fsum(math.exp(log - highest) for log in logs) / len(STAKES))


def at_most(k: float, n: int, alpha: float) -> float:
    """A chance that the true one exceeds with probability alpha at most, however often one looks; 1 where nothing is known."""
    low, high = (k / n if n else 1.0), 1.0
    needed = math.log(1 / alpha)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if log_excess(n - k, n, 1 - middle) >= needed else (middle, high)
    return high


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
"""Student's t quantiles of a two-sided 95 % interval for 1 to 16 degrees of freedom; beyond, 2.11 errs on the wide side."""


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """The mean of independent runs with Student's 95 % interval; a single run says nothing of the spread (infinite bounds)."""
    n = len(values)
    mean = fmean(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    half = (T95[n - 2] if n - 2 < len(T95) else 2.11) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rank correlation, in [-1, 1]; ties share the mean of their ranks. ValueError where one side is constant."""
    return correlation(_ranks(left), _ranks(right))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    # The mean of the ranks (from 1) of all equal values.
    return [(bisect_left(ordered, value) + 1 + bisect_right(ordered, value)) / 2 for value in values]
