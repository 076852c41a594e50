"""What the gate says of an open duel now."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Self

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.loop import evaluate, gate
from pairloop.store import duels, quarantines
from pairloop.store.canaries import Canary
from pairloop.types import BASE_VERSION, Cycle, Duel, DuelPick, Interval, LabelledGroup, Verdict


def standing(
    c: Connection, config: Config, duel: Duel, report: Mapping[str, Any], votes: Sequence[DuelPick] | None = None
) -> Verdict:
    """The verdict on the duel's ``votes`` (by default those so far), after the offline report of its check. Records nothing."""
    votes = votes_so_far(c, config, duel) if votes is None else votes
    is_anchored = config.gate.seed_share > 0 or duel.champion != BASE_VERSION
    return gate.decide(
        evaluate.Report.from_json(report),
        votes,
        config.gate,
        opened_at=duel.opened_at,
        now=datetime.now(UTC),
        picks_made=duels.count_picks(c, duel.duel_id),
        duel_number=duels.number(c, duel),
        seed_votes=_against_base(c, config, duel, votes) if is_anchored else None,
    )


_KEPT = "against_base"


@dataclass(frozen=True, slots=True)
class AgainstBase:
    """How a challenger did against the base in a live duel. ``win_rate``: its own, ties half, as the gate reads it."""

    win_rate: Interval
    wins: int
    losses: int
    ties: int
    raters: int

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; ``from_json`` is the way back."""
        return {**asdict(self), "win_rate": self.win_rate._asdict()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "win_rate": Interval(**data["win_rate"])})


def base_record(c: Connection, config: Config, duel: Duel) -> Mapping[str, Any]:
    """What the step that ends a duel keeps of how its challenger does against the base; ``kept_against_base`` reads it."""
    met = against_base(c, config, duel, votes_so_far(c, config, duel))
    return {} if met is None else {_KEPT: met.as_json()}


def kept_against_base(cycle: Cycle) -> AgainstBase | None:
    """What was known when the gate decided about the cycle's challenger; None before, and where the two never met."""
    found = next((step.record[_KEPT] for step in cycle.steps if _KEPT in step.record), None)
    return None if found is None else AgainstBase.from_json(found)


def against_base(c: Connection, config: Config, duel: Duel, votes: Sequence[DuelPick]) -> AgainstBase | None:
    """How the challenger of ``duel``, whose votes so far are ``votes``, does against the base; None where they do not meet."""
    met = _against_base(c, config, duel, votes)
    if met is None:
        return None
    rate, tally = gate.against_base(met, config.gate)
    return AgainstBase(rate, tally.wins, tally.losses, tally.ties, tally.raters)


def _against_base(c: Connection, config: Config, duel: Duel, votes: Sequence[DuelPick]) -> Sequence[DuelPick] | None:
    """Votes of the seed duel beside ``duel``; those of ``duel`` itself where the base is its champion; else None."""
    if duel.champion == BASE_VERSION:
        return votes
    seed = duels.seed_of(c, duel)
    return None if seed is None else votes_so_far(c, config, seed)


def turning(c: Connection, config: Config, canary: Canary) -> str | None:
    """The guard of a canary whose duel goes on: what it says where the picks since it began turn against it, else None.

    Picks from before are what the gate promoted it on, so they are not counted again. ``deploy.alpha`` bounds the chance that
    it speaks up against a version that is no worse.
    """
    duel = duels.current(c, canary.policy)
    if duel is None or duel.cycle_id != canary.cycle_id:
        return None
    fresh = [vote for vote in votes_so_far(c, config, duel) if vote.created_at >= canary.opened_at]
    counted = gate.count(fresh, config.gate)
    against = gate.e_value_of(counted, gate.CHAMPION)
    if against < 1 / config.deploy.alpha:
        return None
    tally = counted.tally
    return f"duel: the champion won {tally.losses} of {tally.decisive} picks since the canary began, e-value {against:.3g}"


def votes_so_far(c: Connection, config: Config, duel: Duel) -> list[DuelPick]:
    """The duel's votes, without those of quarantined raters."""
    return votes_of(config, duel, duels.picks(c, duel.duel_id), quarantines.current(c, duel.policy))


def votes_of(config: Config, duel: Duel, picks: Iterable[LabelledGroup], quarantined: Collection[str]) -> list[DuelPick]:
    """The votes that some of the duel's picks are."""
    return gate.votes(
        duel, picks, min_latency_ms=config.feedback.min_latency_ms, quarantined=quarantined, slices=config.gate.slices
    )
