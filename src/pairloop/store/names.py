"""Names under which people sign in: of one name there is one account or key that is good, for its votes are counted under it.

Databases from before this rule may hold several keys of a name, or a key and an account. The account has the name then, else
the oldest key that is good; the other keys work as ever for programs, but sign nobody in (ADR 0033). Nor does a key that is
called like an operator's own vote, which no new one may be.
"""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.errors import ConflictError
from pairloop.store.schema import accounts, keys
from pairloop.store.subjects import is_reserved


def refuse_taken(c: Connection, name: str, at: datetime) -> None:
    """ConflictError where an account has the name, or a key that is good ``at`` that time."""
    holder = _holder(c, name, at)
    if holder is not None:
        what = f"an account {name!r}" if holder == f"account:{name}" else f"a key {name!r} ({holder.removeprefix('key:')})"
        text = f"there is {what} already, and who signs in asks and picks under that name: choose another name, or end that one"
        raise ConflictError(text, param="name")


def is_anothers(c: Connection, key_id: str, name: str, at: datetime) -> bool:
    """Whether the name that a key has is that of an account, of an older key that is good, or of an operator's own votes."""
    return is_reserved(name) or _holder(c, name, at) not in (None, f"key:{key_id}")


def _holder(c: Connection, name: str, at: datetime) -> str | None:
    """Whose the name is, as the audit trail names it."""
    of_account = sa.select(accounts.c.name).where(accounts.c.name == name, accounts.c.removed_at.is_(None))
    if c.execute(of_account).first() is not None:
        return f"account:{name}"
    is_good = keys.c.revoked_at.is_(None) & (keys.c.expires_at.is_(None) | (keys.c.expires_at > at))
    of_key = sa.select(keys.c.key_id).where(keys.c.name == name, is_good).order_by(keys.c.created_at, keys.c.key_id).limit(1)
    key_id = c.execute(of_key).scalar()
    return None if key_id is None else f"key:{key_id}"
