"""Were the sides a fair coin, and is the gain more than side and length? A Bradley–Terry model with both as terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pairloop.loop.gate.logistic import fit
from pairloop.statistics import Z95
from pairloop.types import DuelPick, Interval, Reason

COIN_ALPHA = 0.001
"""Chance of ever holding a duel whose coin is fair; a coin of .55 is found after about 2,000 votes, one of .6 after 500."""
MIN_VOTES = 50
"""Decisive votes from which the model is fitted."""
_RIDGE = 1e-3
"""Keeps the fit finite where one term tells wins and losses apart completely; far below what a vote weighs."""


def coin(duel_votes: Sequence[DuelPick]) -> Reason | None:
    """Whether the challenger was shown first as often as a fair coin would; None where no vote says where it was shown.

    The two-sided mixture e-process: the likelihood under a share uniform on (0, 1), over that at one half. It may be looked
    at after every vote.
    """
    shown = [vote.is_first for vote in duel_votes if vote.is_first is not None]
    if not shown:
        return None
    first, n = sum(shown), len(shown)
    log_e = math.lgamma(first + 1) + math.lgamma(n - first + 1) - math.lgamma(n + 2) + n * math.log(2)
    needed = -math.log(COIN_ALPHA)
    text = f"the challenger was shown first in {first} of {n} votes"
    if log_e >= needed:
        text += (
            f": not a fair coin (e-value {math.exp(min(log_e, 700)):.2g} ≥ {1 / COIN_ALPHA:g}); side and version are mixed up"
        )
        return Reason("sides", False, text, first / n, 0.5)
    return Reason("sides", True, f"{text}: a fair coin could do so", first / n, 0.5)


@dataclass(frozen=True, slots=True)
class BradleyTerry:
    """The challenger's win rate at equal length and side, the odds of the first place, and those per doubled length."""

    win_rate: Interval
    first_place_odds: Interval
    doubled_length_odds: Interval


def bradley_terry(duel_votes: Sequence[DuelPick]) -> BradleyTerry | None:
    """Fitted to the decisive votes that say side and length; None with fewer than `MIN_VOTES`, or where the fit fails.

    log odds(win) = strength + side · (±1/2) + length · log2(length ratio), by Newton's method; normal 95 % intervals from the
    information matrix, which hold for independent votes.
    """
    rows = [
        ((1.0, 0.5 if vote.is_first else -0.5, math.log2(vote.length_ratio)), vote.outcome > 0)
        for vote in duel_votes
        if vote.outcome and vote.is_first is not None and vote.length_ratio is not None
    ]
    fitted = fit(tuple(rows), _RIDGE) if len(rows) >= MIN_VOTES else None
    if fitted is None:
        return None
    weights, variances = fitted
    n = len(rows)
    spans = [(weight, Z95 * math.sqrt(variance)) for weight, variance in zip(weights, variances, strict=True)]
    strength, side, length = (Interval(weight, weight - half, weight + half, n) for weight, half in spans)
    return BradleyTerry(_each(_sigmoid, strength), _each(_exp, side), _each(_exp, length))


def adjusted(duel_votes: Sequence[DuelPick], *, is_required: bool) -> Reason | None:
    """The win rate beyond side and length; open where it is required and its interval reaches one half, else a diagnostic."""
    fitted = bradley_terry(duel_votes)
    if fitted is None:
        return Reason("adjusted_win_rate", None, _TOO_FEW) if is_required else None
    rate, first, length = fitted.win_rate, fitted.first_place_odds, fitted.doubled_length_odds
    text = (
        f"win rate at equal length and side {rate.mean * 100:.0f} % (95 % interval {rate.lo * 100:.0f}–{rate.hi * 100:.0f} %); "
        f"the first place multiplies the odds by {_odds(first)}"
    )
    if length.hi < _UNKNOWN * length.lo:
        text += f", twice the length by {_odds(length)}"
    if not is_required:
        return Reason("adjusted_win_rate", True, text, rate.mean)
    return Reason("adjusted_win_rate", True if rate.lo > 0.5 else None, text, rate.lo, 0.5)


_UNKNOWN = 1e6
"""Where the interval spans this factor the answers' lengths hardly differ, and nothing is known of it."""
_TOO_FEW = f"win rate at equal length and side: takes {MIN_VOTES} decisive votes whose side and length are known"


def _odds(interval: Interval) -> str:
    return f"{interval.mean:.2f} ({interval.lo:.2f}–{interval.hi:.2f})"


def _each(function: Callable[[float], float], of: Interval) -> Interval:
    return Interval(function(of.mean), function(of.lo), function(of.hi), of.n)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
