"""Repairs: what the doctor changed and why, and which losses it was told to accept. Rows are only appended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import repairs


@dataclass(frozen=True, slots=True)
class RepairRecord:
    """One change. ``code``, ``subject`` and ``problem``: what was found; ``is_loss``: it was recorded as lost, not mended."""

    code: str
    subject: str
    problem: str
    action: str
    is_loss: bool
    created_at: datetime


def record(c: Connection, row: RepairRecord) -> None:
    values = {name: getattr(row, name) for name in ("code", "subject", "problem", "action", "is_loss", "created_at")}
    c.execute(sa.insert(repairs), values)


def list_(c: Connection) -> list[RepairRecord]:
    """Oldest first."""
    return [
        RepairRecord(row.code, row.subject, row.problem, row.action, row.is_loss, row.created_at)
        for row in c.execute(sa.select(repairs).order_by(repairs.c.seq))
    ]


def losses(c: Connection) -> set[str]:
    """The subjects that were recorded as lost, and have not come back since."""
    rows = c.execute(sa.select(repairs.c.subject, repairs.c.is_loss).order_by(repairs.c.seq))
    last = {row.subject: row.is_loss for row in rows}
    return {subject for subject, is_loss in last.items() if is_loss}
