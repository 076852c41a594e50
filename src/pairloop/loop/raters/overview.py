"""All raters of the newest picks in one reading: their figures, the tests about them, agreement, quarantines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from pairloop.config import Config
from pairloop.loop.raters import desk
from pairloop.loop.raters.checks import Observed, check
from pairloop.loop.raters.flips import FlipRate, flip_rate
from pairloop.loop.raters.profile import Agreement, Profile, agreement, profiles, votes_of
from pairloop.store import Store, gold, picked, quarantines
from pairloop.store.picked import Picked
from pairloop.store.quarantines import Quarantine
from pairloop.types import GOLD_METRIC, PREFERENCE_METRIC


@dataclass(frozen=True, slots=True)
class Overview:
    """``rows`` were read, back to the ``since`` day; ``decisions`` are all quarantines and releases, newest first."""

    rows: int
    since: date | None
    profiles: Sequence[Profile]
    agreement: Agreement | None
    flip_rate: FlipRate | None
    quarantined: Mapping[str, Quarantine]
    decisions: Sequence[Quarantine]
    gold_items: int
    is_whole: bool
    """Whether all picks there are were read."""


def overview(store: Store, config: Config, *, newest: int = desk.NEWEST) -> Overview:
    """Reads the ``newest`` picks, repeats and answers to gold items among them."""
    policy = config.policy.name
    with store.reading() as c:
        rows = picked.newest(c, policy, newest)
        challengers = desk.challengers_of(c, policy)
        answered = gold.answers(c, policy)
        decisions = quarantines.history(c, policy)[::-1]
        held = quarantines.current(c, policy)
        gold_items = gold.count(c, policy)
    seen, votes = _observed(rows, challengers, config)
    asked_twice = [one for rater, own in seen.items() if rater not in held for one in own]
    return Overview(
        rows=len(rows),
        since=rows[-1].created_at.date() if rows else None,
        profiles=profiles(rows, seen, answered, check(votes)),
        agreement=agreement(votes_of(rows)),
        flip_rate=flip_rate(asked_twice),
        quarantined=held,
        decisions=decisions,
        gold_items=gold_items,
        is_whole=len(rows) < newest,
    )


def alone(store: Store, config: Config, rater_id: str, *, newest: int) -> Profile | None:
    """One rater by their own newest picks, however old, beside nobody; None where they picked from nothing."""
    policy = config.policy.name
    with store.reading() as c:
        rater_id = desk.known_id(c, store, policy, rater_id)
        rows = [row for row in picked.of_rater(c, policy, rater_id, limit=newest) if row.revision == 0]
        challengers = desk.challengers_of(c, policy)
        answered = [answer for answer in gold.answers(c, policy) if answer.rater_id == rater_id]
    seen, votes = _observed(rows, challengers, config)
    return next(iter(profiles(rows, seen, answered, check(votes))), None)


def _observed(
    rows: Sequence[Picked], challengers: Mapping[str, int], config: Config
) -> tuple[dict[str, list[Observed]], list[Observed]]:
    """What the tests look at, oldest first: votes and repeats by rater, and all votes."""
    seen: dict[str, list[Observed]] = defaultdict(list)
    votes: list[Observed] = []
    for row in reversed(rows):
        if row.metric == GOLD_METRIC:
            continue
        one = desk.observed(row, challengers, config.feedback.min_latency_ms)
        seen[row.rater_id].append(one)
        if row.metric == PREFERENCE_METRIC:
            votes.append(one)
    return seen, votes
