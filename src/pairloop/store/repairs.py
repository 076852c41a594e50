"""Repairs in the audit trail: what the doctor changed and why, and which losses it was told to accept."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from pairloop.store import audit
from pairloop.store.audit import AuditAction


@dataclass(frozen=True, slots=True)
class RepairRecord:
    """One change. ``code``, ``subject`` and ``problem``: what was found; ``is_loss``: it was recorded as lost, not mended."""

    code: str
    subject: str
    problem: str
    action: str
    is_loss: bool
    created_at: datetime


def record(c: Connection, row: RepairRecord, *, actor: str) -> None:
    details = {"code": row.code, "action": row.action, "is_loss": row.is_loss}
    audit.record(
        c, AuditAction.REPAIR, actor=actor, subject=row.subject, reason=row.problem, details=details, at=row.created_at
    )


def list_(c: Connection) -> list[RepairRecord]:
    """Oldest first."""
    return [
        RepairRecord(one.details["code"], one.subject, one.reason, one.details["action"], one.details["is_loss"], one.at)
        for one in reversed(audit.list_(c, action=AuditAction.REPAIR))
    ]


def losses(c: Connection) -> set[str]:
    """The subjects that were recorded as lost, and have not come back since."""
    last = {row.subject: row.is_loss for row in list_(c)}
    return {subject for subject, is_loss in last.items() if is_loss}
