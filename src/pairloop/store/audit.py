"""The audit trail: who did what to the loop, when and why. Rows are appended with the act, and never change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.store.schema import audit

SCHEDULER = "scheduler"
"""The actor of what the loop does by itself."""
_ID = "audit_"
_HIGHEST = 2**63


class AuditAction(StrEnum):
    """What can be done to a loop from outside its evidence."""

    PROMOTE = "promote"
    ROLLBACK = "rollback"
    RETIRE = "retire"
    CANARY_START = "canary_start"
    CANARY_STOP = "canary_stop"
    QUARANTINE = "quarantine"
    RELEASE = "release"
    GOLD_ADD = "gold_add"
    GOLD_REMOVE = "gold_remove"
    EXCLUDE = "exclude"
    INCLUDE = "include"
    RELABEL = "relabel"
    ENQUEUE = "enqueue"
    DEQUEUE = "dequeue"
    KEY_CREATE = "key_create"
    KEY_REVOKE = "key_revoke"
    ACCOUNT_CREATE = "account_create"
    ACCOUNT_CHANGE = "account_change"
    ACCOUNT_REMOVE = "account_remove"
    SESSION_END = "session_end"
    ERASE = "erase"
    RETENTION = "retention"
    REBUILD = "rebuild"
    BACKUP = "backup"
    RESTORE = "restore"
    REPAIR = "repair"
    CYCLE_START = "cycle_start"
    CYCLE_CANCEL = "cycle_cancel"
    SCHEDULE_SET = "schedule_set"
    SCHEDULE_RESET = "schedule_reset"
    FILE_DELETE = "file_delete"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One act. ``actor``: ``key:<id>``, ``account:<name>``, ``address:<ip>``, ``cli:<login>`` or ``scheduler``.

    ``subject``: to what.
    """

    seq: int
    at: datetime
    actor: str
    action: str
    subject: str
    reason: str
    details: Mapping[str, Any]

    @property
    def audit_id(self) -> str:
        return f"{_ID}{self.seq}"


def record(
    c: Connection,
    action: AuditAction,
    *,
    actor: str,
    subject: str,
    reason: str,
    details: Mapping[str, Any] | None = None,
    at: datetime | None = None,
) -> int:
    """Append an act in the caller's transaction, so that there is neither without the other; its ``seq``.

    Never pass message text.
    """
    row = {"at": at or datetime.now(UTC), "actor": actor, "action": action.value, "subject": subject, "reason": reason}
    statement = sa.insert(audit).returning(audit.c.seq)
    return int(c.execute(statement, {**row, "details": dict(details or {})}).scalar_one())


def list_(
    c: Connection,
    *,
    limit: int | None = None,
    after: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    action: str | None = None,
    actor: str | None = None,
    subject: str | None = None,
) -> list[AuditEntry]:
    """Newest first; those that follow the entry ``after``, from ``since`` on and before ``until``.

    ``actor`` and ``subject``: parts of them, in any case of letters. NotFoundError where there is no entry ``after``,
    InvalidRequestError for an unknown action.
    """
    statement = sa.select(audit).order_by(audit.c.seq.desc()).limit(limit)
    if after is not None:
        statement = statement.where(audit.c.seq < _seq(c, after))
    if since is not None:
        statement = statement.where(audit.c.at >= since)
    if until is not None:
        statement = statement.where(audit.c.at < until)
    for column, part in ((audit.c.actor, actor), (audit.c.subject, subject)):
        if part:
            statement = statement.where(column.icontains(part, autoescape=True))
    if action is not None:
        if action not in list(AuditAction):
            raise InvalidRequestError(f"no action {action!r}; there are {', '.join(AuditAction)}", param="action")
        statement = statement.where(audit.c.action == action)
    return [_entry(row) for row in c.execute(statement)]


def _seq(c: Connection, audit_id: str) -> int:
    digits = audit_id.removeprefix(_ID)
    is_id = digits != audit_id and digits.isascii() and digits.isdigit() and len(digits) < 20 and int(digits) < _HIGHEST
    if not is_id or c.execute(sa.select(audit.c.seq).where(audit.c.seq == int(digits))).first() is None:
        raise NotFoundError(f"no entry {audit_id!r} of the audit trail", param="after")
    return int(digits)


def _entry(row: Row[Any]) -> AuditEntry:
    return AuditEntry(row.seq, row.at, row.actor, row.action, row.subject, row.reason, row.details)
