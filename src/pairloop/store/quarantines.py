"""Quarantines: which raters' votes are set aside, by whom it was decided and why. Rows are appended; votes stay as they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import quarantines


class Action(StrEnum):
    QUARANTINE = "quarantine"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class Quarantine:
    """One decision about a rater; the newest one holds."""

    rater_id: str
    action: Action
    reason: str
    created_at: datetime


def insert(c: Connection, policy: str, decision: Quarantine) -> None:
    c.execute(sa.insert(quarantines), {"policy": policy, **asdict(decision), "action": decision.action.value})


def history(c: Connection, policy: str) -> list[Quarantine]:
    """Every decision, oldest first."""
    rows = c.execute(sa.select(quarantines).where(quarantines.c.policy == policy).order_by(quarantines.c.seq))
    return [Quarantine(row.rater_id, Action(row.action), row.reason, row.created_at) for row in rows]


def current(c: Connection, policy: str) -> dict[str, Quarantine]:
    """The decision that holds a rater, by rater; released ones are not in it."""
    newest = {decision.rater_id: decision for decision in history(c, policy)}
    return {rater: decision for rater, decision in newest.items() if decision.action is Action.QUARANTINE}
