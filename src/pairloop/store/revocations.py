"""Who may come in after a restore: what was revoked, removed or changed since the backup stays so.

Read from the database that the restore replaces, and done to the copy that is to take its place. Keys and accounts that were
made since are not in the backup and do not come along, but where the backup is from before the first of them: what was locked
once stays locked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Table
from sqlalchemy.exc import SQLAlchemyError

from pairloop.store import accounts
from pairloop.store.audit import AuditAction
from pairloop.store.schema import accounts as account_table
from pairloop.store.schema import audit as audit_table
from pairloop.store.schema import keys as key_table

_ACTIONS = tuple(
    action.value
    for action in (
        AuditAction.KEY_CREATE,
        AuditAction.KEY_REVOKE,
        AuditAction.ACCOUNT_CREATE,
        AuditAction.ACCOUNT_CHANGE,
        AuditAction.ACCOUNT_REMOVE,
    )
)
_KEPT = ("role", "password_hash", "created_at", "removed_at")
"""Of an account; when it last signed in says nothing about whether it may."""

Line = tuple[datetime, str, str]
"""An act of the audit trail, as two databases can compare it: their sequence numbers are their own."""


@dataclass(frozen=True, slots=True)
class Access:
    """Keys by id, accounts by name, and what the audit trail tells about both: rows as they are stored."""

    keys: Mapping[str, Mapping[str, Any]]
    accounts: Mapping[str, Mapping[str, Any]]
    acts: Sequence[Mapping[str, Any]]

    def lines(self) -> set[Line]:
        return {_line(act) for act in self.acts}

    def about(self, subject: str) -> set[Line]:
        return {_line(act) for act in self.acts if act["subject"] == subject}


def read(engine: Engine) -> Access | None:
    """What a database tells, of whichever revision; None where it cannot be read."""
    try:
        with engine.connect() as c:
            return _read(c)
    except SQLAlchemyError:
        return None


def hold(c: Connection, former: Access) -> int | None:
    """Do to the restored rows what was done to the former ones since; how many keys and accounts that changed.

    None where the former database knows nothing of them, and so cannot tell.
    A key is the same by its id. An account is the same where both databases know an act about it: another installation's of the
    same name is somebody else. Whose last act about it is the later one is right: an older state says nothing.
    """
    restored, known = _read(c), former.lines()
    if accounts.is_locked(c):
        if former.keys.keys().isdisjoint(restored.keys) and known.isdisjoint(restored.lines()):
            return None
        changed = _revoke(c, restored, former)
        for name, row in restored.accounts.items():
            now = former.accounts.get(name)
            if now is None or row["removed_at"] is not None or not _is_later(name, former, restored):
                continue
            if any(row[column] != now[column] for column in _KEPT):
                values = {column: now[column] for column in _KEPT}
                c.execute(sa.update(account_table).where(account_table.c.name == name).values(values))
                changed.append(f"account:{name}")
    else:
        changed = [*map(_key, former.keys), *(f"account:{name}" for name in former.accounts)]
        for table, rows in ((key_table, former.keys), (account_table, former.accounts)):
            for row in rows.values():
                c.execute(sa.insert(table), dict(row))
    there = restored.lines()
    for act in former.acts:
        if act["subject"] in changed and _line(act) not in there:
            c.execute(sa.insert(audit_table), {name: value for name, value in act.items() if name != "seq"})
    return len(changed)


def _is_later(account: str, former: Access, restored: Access) -> bool:
    """Whether it is the same account in both, and no act about it that the backup has is later than all the former ones."""
    then, now = (access.about(f"account:{account}") for access in (restored, former))
    return not then.isdisjoint(now) and max(now) >= max(then)


def _revoke(c: Connection, restored: Access, former: Access) -> list[str]:
    """The subjects of the keys that were revoked since."""
    changed = []
    for key_id, row in restored.keys.items():
        at = former.keys[key_id]["revoked_at"] if key_id in former.keys else None
        if at is not None and row["revoked_at"] is None:
            c.execute(sa.update(key_table).where(key_table.c.key_id == key_id).values(revoked_at=at))
            changed.append(_key(key_id))
    return changed


def _read(c: Connection) -> Access:
    there = set(sa.inspect(c).get_table_names())

    def rows(table: Table, name: Callable[[Mapping[str, Any]], str]) -> dict[str, Mapping[str, Any]]:
        found = [dict(row) for row in c.execute(sa.select(table)).mappings()] if table.name in there else []
        return {name(row): row for row in found}

    acts = sa.select(audit_table).where(audit_table.c.action.in_(_ACTIONS)).order_by(audit_table.c.seq)
    return Access(
        rows(key_table, lambda row: str(row["key_id"])),
        rows(account_table, lambda row: str(row["name"])),
        [dict(act) for act in c.execute(acts).mappings()] if audit_table.name in there else [],
    )


def _key(key_id: str) -> str:
    return f"key:{key_id}"


def _line(act: Mapping[str, Any]) -> Line:
    return act["at"], act["action"], act["subject"]
