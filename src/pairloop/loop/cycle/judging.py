"""What the gate says of an open duel now."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.loop import evaluate, gate
from pairloop.store import duels, quarantines
from pairloop.store.canaries import Canary
from pairloop.types import Duel, DuelPick, LabelledGroup, Verdict


def standing(
    c: Connection, config: Config, duel: Duel, report: Mapping[str, Any], votes: Sequence[DuelPick] | None = None
) -> Verdict:
    """The verdict on the duel's ``votes`` (by default those so far), after the offline report of its check. Records nothing."""
    return gate.decide(
        evaluate.Report.from_json(report),
        votes_so_far(c, config, duel) if votes is None else votes,
        config.gate,
        opened_at=duel.opened_at,
        now=datetime.now(UTC),
        picks_made=duels.count_picks(c, duel.duel_id),
        duel_number=duels.number(c, duel),
    )


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


def votes_of(config: Config, duel: Duel, picks: Sequence[LabelledGroup], quarantined: Collection[str]) -> list[DuelPick]:
    """The votes that some of the duel's picks are."""
    return gate.votes(
        duel, picks, min_latency_ms=config.feedback.min_latency_ms, quarantined=quarantined, slices=config.gate.slices
    )
