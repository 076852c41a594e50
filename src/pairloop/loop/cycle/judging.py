"""What the gate says of an open duel now."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.loop import evaluate, gate
from pairloop.store import duels, quarantines
from pairloop.types import Duel, DuelPick, Verdict


def standing(c: Connection, config: Config, duel: Duel, report: Mapping[str, Any]) -> Verdict:
    """The verdict on the duel's votes so far, after the offline report of its check. Records nothing."""
    return gate.decide(
        evaluate.Report.from_json(report),
        votes_so_far(c, config, duel),
        config.gate,
        opened_at=duel.opened_at,
        now=datetime.now(UTC),
        picks_made=duels.count_picks(c, duel.duel_id),
        duel_number=duels.number(c, duel),
    )


def votes_so_far(c: Connection, config: Config, duel: Duel) -> list[DuelPick]:
    """The duel's votes, without those of quarantined raters."""
    return gate.votes(
        duel,
        duels.picks(c, duel.duel_id),
        min_latency_ms=config.feedback.min_latency_ms,
        quarantined=quarantines.current(c, duel.policy),
        slices=config.gate.slices,
    )
