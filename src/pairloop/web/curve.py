"""The curve of versions: how each challenger did in its duel, and what that adds up to against the base. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pairloop.loop.gate import win_rate
from pairloop.statistics import Z95
from pairloop.types import BASE_VERSION, Interval


@dataclass(frozen=True, slots=True)
class Contest:
    """One challenger's comparisons with the champion of its time; ``verdict`` is None while the duel is open.

    ``at``: when the verdict was given, or the open duel began. ``met_base``: its win rate where raters compared it with the
    base itself, None where they did not.
    """

    challenger: int
    champion: int
    wins: int
    losses: int
    ties: int
    verdict: str | None
    at: datetime | None = None
    met_base: Interval | None = None

    @property
    def rate(self) -> Interval:
        """The challenger's win rate, ties half."""
        return win_rate(self.wins + self.ties / 2, self.wins + self.losses + self.ties)


@dataclass(frozen=True, slots=True)
class Point:
    """A challenger on the curve: its own duel, and its estimated win rate against the base (``contest.met_base``: the seen)."""

    contest: Contest
    rate: Interval
    against_base: Interval


def curve(contests: Sequence[Contest]) -> list[Point]:
    """One point per contest, in order.

    Against the base: log-odds of the duels along the chain of champions, summed (Bradley-Terry), each with half a pick added
    to either side; the interval is the normal one on the log-odds scale. Of a champion that no contest is known of (one that
    was promoted by hand) nothing is known, nor of what was compared with it: their intervals go from 0 to 1.
    """
    strength: dict[int, tuple[float, float]] = {BASE_VERSION: (0.0, 0.0)}
    points = []
    for contest in contests:
        n = contest.wins + contest.losses + contest.ties
        won = contest.wins + contest.ties / 2 + 0.5
        lost = n + 1 - won
        at, variance = strength.get(contest.champion, (0.0, math.inf))
        strength[contest.challenger] = (at + math.log(won / lost), variance + 1 / won + 1 / lost)
        points.append(Point(contest, contest.rate, _interval(*strength[contest.challenger], n)))
    return points


def _interval(log_odds: float, variance: float, n: int) -> Interval:
    half = Z95 * math.sqrt(variance)
    return Interval(_logistic(log_odds), _logistic(log_odds - half), _logistic(log_odds + half), n)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def as_json(points: Sequence[Point]) -> list[Mapping[str, object]]:
    return [
        {
            "version": point.contest.challenger,
            "champion": point.contest.champion,
            "verdict": point.contest.verdict,
            "wins": point.contest.wins,
            "losses": point.contest.losses,
            "ties": point.contest.ties,
            "win_rate": point.rate.mean,
            "ci95": [point.rate.lo, point.rate.hi],
            "against_base": point.against_base.mean,
            "against_base_ci95": [point.against_base.lo, point.against_base.hi],
            "met_base": None if point.contest.met_base is None else _seen(point.contest.met_base),
        }
        for point in points
    ]


def _seen(rate: Interval) -> Mapping[str, object]:
    return {"win_rate": rate.mean, "ci95": [rate.lo, rate.hi], "votes": rate.n}
