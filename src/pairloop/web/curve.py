"""The curve of versions: how each challenger did in its duel, and what that adds up to against the base. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pairloop.loop.gate import win_rate
from pairloop.types import BASE_VERSION, Interval

Z95 = 1.96
LEFT, RIGHT, TOP, BOTTOM = 46.0, 16.0, 18.0, 34.0
WIDTH, HEIGHT = 820.0, 240.0
MAX_STEP = 110.0


@dataclass(frozen=True, slots=True)
class Contest:
    """One challenger's comparisons with the champion of its time; ``verdict`` is None while the duel is open.

    ``met_base``: its win rate where raters compared it with the base itself, None where they did not.
    """

    challenger: int
    champion: int
    wins: int
    losses: int
    ties: int
    verdict: str | None
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
    to either side; the interval is the normal one on the log-odds scale.
    """
    strength: dict[int, tuple[float, float]] = {BASE_VERSION: (0.0, 0.0)}
    points = []
    for contest in contests:
        n = contest.wins + contest.losses + contest.ties
        won = contest.wins + contest.ties / 2 + 0.5
        lost = n + 1 - won
        at, variance = strength.get(contest.champion, (0.0, 0.0))
        strength[contest.challenger] = (at + math.log(won / lost), variance + 1 / won + 1 / lost)
        points.append(Point(contest, contest.rate, _interval(*strength[contest.challenger], n)))
    return points


def _interval(log_odds: float, variance: float, n: int) -> Interval:
    half = Z95 * math.sqrt(variance)
    return Interval(_logistic(log_odds), _logistic(log_odds - half), _logistic(log_odds + half), n)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in the drawing's coordinates."""

    point: Point
    x: float
    y: float
    y_lo: float
    y_hi: float
    y_base: float
    champion: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """What the template draws: marks, the grid, and the line of champions against the base."""

    width: float
    height: float
    left: float
    right: float
    bottom: float
    base_x: float
    y_half: float
    grid: tuple[tuple[str, float], ...]
    marks: tuple[Mark, ...]
    line: str


def chart(points: Sequence[Point], *, champion: int) -> Chart:
    """Lay the curve out in a WIDTH x HEIGHT box."""
    step = min(MAX_STEP, (WIDTH - LEFT - RIGHT - 24) / max(1, len(points)))
    base_x = LEFT + 24
    marks = tuple(
        Mark(
            point=point,
            x=round(base_x + step * (position + 1), 1),
            y=_y(point.rate.mean),
            y_lo=_y(point.rate.lo),
            y_hi=_y(point.rate.hi),
            y_base=_y(point.against_base.mean),
            champion=point.contest.challenger == champion,
        )
        for position, point in enumerate(points)
    )
    promoted = [mark for mark in marks if mark.point.contest.verdict == "PROMOTE"]
    line = " ".join(f"{x},{y}" for x, y in [(round(base_x, 1), _y(0.5)), *((mark.x, mark.y_base) for mark in promoted)])
    grid = tuple((f"{percent} %", _y(percent / 100)) for percent in (0, 25, 50, 75, 100))
    return Chart(WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, base_x, _y(0.5), grid, marks, line)


def _y(share: float) -> float:
    return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)


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
