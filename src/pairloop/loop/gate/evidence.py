"""The e-process: how much the votes say that the challenger wins more than half, valid however often one looks.

Both forms are mixtures of bets against "no better", so their mean under it never exceeds 1, and Ville's inequality bounds the
chance of ever reaching 1/alpha by alpha.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from functools import cache, lru_cache

from pairloop.statistics import share
from pairloop.types import Interval

MAX_LOG = math.log(sys.float_info.max)
STAKES = tuple((j + 0.5) / 32 for j in range(32))
"""What `Staked` bets, each with the same weight. Any fixed list is valid; a finer one gains nothing."""
_NEGLIGIBLE = 1e-18


def log_e_value(wins: int, losses: int) -> float:
    """Natural logarithm of :func:`e_value`; finite for any counts.

    With n = W + L and P(Beta(W+1, L+1) > 1/2) = P(Bin(n+1, 1/2) <= W) the powers of two cancel:
    E = sum_{k<=W} C(n+1, k) / ((L+1) C(n+1, W)). Summed downwards from k = W, term j is prod_{i<j} (W-i) / (L+2+i):
    all terms are positive, so nothing cancels and every digit is right.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"counts must not be negative: {wins} wins, {losses} losses")
    scale = 0.0  # log of what `term` and `total` are divided by, so that neither overflows
    term = total = 1.0
    for j in range(wins):
        ratio = (wins - j) / (losses + 2 + j)
        term *= ratio
        total += term
        if ratio < 1.0 and term < total * _NEGLIGIBLE:
            break  # ratios only fall from here: the rest is below the last digit
        if total > 1e250:
            scale += math.log(total)
            term /= total
            total = 1.0
    return scale + math.log(total) - math.log(losses + 1)


def e_value(wins: int, losses: int) -> float:
    """Evidence that the challenger wins more than half: E = 2^{n+1} B(W+1, L+1) P(Beta(W+1, L+1) > 1/2).

    The likelihood of the picks under a win rate uniform on (1/2, 1), divided by that at 1/2. Capped at the largest float.
    The evidence for the champion is ``e_value(losses, wins)``.
    """
    return capped(log_e_value(wins, losses))


def capped(log_e_value: float) -> float:
    """The e-value itself; at most the largest float."""
    return math.exp(min(log_e_value, MAX_LOG))


BORDERS = 8
"""Kept in mind: with lifetime spending each duel has an alpha of its own."""


class Border:
    """By number of votes, the fewest wins whose e-value reaches 1/alpha: what `log_e_value` says, remembered."""

    def __init__(self, alpha: float) -> None:
        self._needed = math.log(1 / alpha)
        self._fewest: list[int] = []

    def is_reached(self, wins: int, losses: int) -> bool:
        n = wins + losses
        while len(self._fewest) <= n:
            self._append()
        return wins >= self._fewest[n]

    def _append(self) -> None:
        """The fewest wins of n + 1 votes are those of n or one more: a further win raises the e-value, a loss lowers it."""
        n = len(self._fewest)
        wins = self._fewest[-1] if self._fewest else 0
        while wins <= n and log_e_value(wins, n - wins) < self._needed:
            wins += 1
        self._fewest.append(wins)


@lru_cache(BORDERS)
def border(alpha: float) -> Border:
    return Border(alpha)


class Staked:
    """The mean over stakes s in (0, 1) of prod (1 + s k/of) over all raters; k: a rater's wins less losses, of ``of`` picks.

    The bet on one rater loses at most all of its stake, however much that rater's picks resemble one another: it is raters that
    are independent, not picks.
    """

    def __init__(self, of: int) -> None:
        self._of = of
        self._logs = [0.0] * len(STAKES)

    def move(self, before: int, after: int, raters: int = 1) -> None:
        """``raters`` raters whose wins less losses were ``before`` now have ``after``."""
        step = _step(self._of, before, after)
        self._logs = [log + raters * one for log, one in zip(self._logs, step, strict=True)]

    def without(self, raters: Iterable[tuple[int, int]]) -> Staked:
        """As if some had never voted: (wins less losses, number of raters)."""
        fewer = Staked(self._of)
        fewer._logs = self._logs
        for net, n in raters:
            fewer.move(net, 0, n)
        return fewer

    @property
    def log_e_value(self) -> float:
        highest = max(self._logs)
        return highest + math.log(math.fsum(math.exp(log - highest) for log in self._logs) / len(STAKES))

    def is_at_least(self, log_e_value: float) -> bool:
        """Whether the evidence reaches that; mostly known at a glance, for a mean is at most the largest of all."""
        return max(self._logs) >= log_e_value and self.log_e_value >= log_e_value


@cache
def _step(of: int, before: int, after: int) -> tuple[float, ...]:
    return tuple(math.log1p(stake * after / of) - math.log1p(stake * before / of) for stake in STAKES)


def win_rate(wins: float, n: int) -> Interval:
    """Share of wins with its Wilson 95 % interval."""
    return share(wins / n if n else 0.5, n)
