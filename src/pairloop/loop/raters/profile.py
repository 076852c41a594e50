"""One rater in figures: how much, how fast, which side, how often with others, right where the answer is known. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from statistics import fmean, median

from pairloop.loop.raters.checks import Checked, Observed
from pairloop.loop.raters.flips import FlipRate, flip_rate
from pairloop.statistics import krippendorff_alpha, share
from pairloop.store.gold import Answered
from pairloop.store.picked import Picked
from pairloop.store.queue import Vote
from pairloop.types import PREFERENCE_METRIC, Interval, Label


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of comparisons that two or more people picked from: how often two of them say the same, and alpha (see statistics).

    ``rate.n`` is the number of comparisons, ``picks`` what was said of them; alpha is None where it says nothing.
    """

    rate: Interval
    picks: int
    alpha: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """A rater's figures; an interval's ``n`` says of how many, and None stands where there is nothing to tell.

    ``left``: share of picks for the first place. ``agreement``: share of the others who say the same, over comparisons.
    ``gold``: share of gold items answered right. ``median_ms``: from seeing to picking.
    """

    rater_id: str
    picks: int
    days: Mapping[date, int]
    last_at: datetime
    left: Interval | None
    agreement: Interval | None
    gold: Interval | None
    flips: FlipRate | None
    median_ms: float | None
    instant: int
    checked: Checked | None


def agreement(votes: Iterable[Vote]) -> Agreement | None:
    """Of the votes; skips say nothing. None where no comparison was picked from by two."""
    units = [list(said.values()) for said in _units(votes) if len(said) > 1]
    if not units:
        return None
    return Agreement(share(fmean(map(_same, units)), len(units)), sum(map(len, units)), krippendorff_alpha(units))


def _same(unit: Sequence[Label]) -> float:
    """The share of the pairs of raters that agree."""
    return sum(k * (k - 1) for k in Counter(unit).values()) / (len(unit) * (len(unit) - 1))


def votes_of(rows: Iterable[Picked]) -> list[Vote]:
    """The votes among the rows."""
    return [Vote(row.group_id, row.rater_id, row.label) for row in rows if row.metric == PREFERENCE_METRIC]


def _units(votes: Iterable[Vote]) -> list[dict[str, Label]]:
    """What each rater voted, by comparison."""
    units: dict[str, dict[str, Label]] = defaultdict(dict)
    for vote in votes:
        if vote.label is not Label.SKIP:
            units[vote.group_id][vote.rater_id] = vote.label
    return list(units.values())


def profiles(
    rows: Sequence[Picked],
    seen: Mapping[str, Sequence[Observed]],
    gold: Iterable[Answered],
    checked: Iterable[Checked],
) -> list[Profile]:
    """Everybody among the rows; ``seen`` holds what the tests look at, by rater."""
    with_others: dict[str, list[float]] = defaultdict(list)
    for said in _units(votes_of(rows)):
        if len(said) > 1:
            counts = Counter(said.values())
            for rater, label in said.items():
                with_others[rater].append((counts[label] - 1) / (len(said) - 1))
    right: dict[str, list[bool]] = defaultdict(list)
    for answer in gold:
        right[answer.rater_id].append(answer.label is answer.right)
    tests = {one.rater_id: one for one in checked}
    by_rater: dict[str, list[Picked]] = defaultdict(list)
    for row in rows:
        by_rater[row.rater_id].append(row)
    return [
        _profile(rater, own, seen.get(rater, ()), with_others.get(rater), right.get(rater), tests.get(rater))
        for rater, own in by_rater.items()
    ]


def _profile(
    rater: str,
    own: Sequence[Picked],
    seen: Sequence[Observed],
    with_others: Sequence[float] | None,
    right: Sequence[bool] | None,
    checked: Checked | None,
) -> Profile:
    votes = [row for row in own if row.metric == PREFERENCE_METRIC]
    places = [row.chosen == row.first_index for row in votes if row.chosen is not None and row.keys[0] != row.keys[1]]
    latencies = [row.latency_ms for row in votes if row.latency_ms is not None]
    return Profile(
        rater_id=rater,
        picks=len(votes),
        days=Counter(row.created_at.date() for row in votes),
        last_at=max(row.created_at for row in own),
        left=_mean(places),
        agreement=_mean(with_others),
        gold=_mean(right),
        flips=flip_rate(seen) if len(seen) > 1 else None,
        median_ms=median(latencies) if latencies else None,
        instant=checked.instant if checked is not None else 0,
        checked=checked,
    )


def _mean(values: Sequence[float] | None) -> Interval | None:
    return share(fmean(values), len(values)) if values else None
