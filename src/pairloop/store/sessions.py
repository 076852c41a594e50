"""Sessions: who is signed in on the pages, by a key or an account. Of the token only a hash is kept (see keys)."""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import ConflictError, NotFoundError
from pairloop.store import accounts, audit, keys, names
from pairloop.store.accounts import Account
from pairloop.store.audit import AuditAction
from pairloop.store.keys import Key, hash_of
from pairloop.store.schema import accounts as account_rows
from pairloop.store.schema import sessions

LASTS = timedelta(days=14)
SLIDES_AFTER = timedelta(hours=1)
"""A session in use is prolonged at most this often."""
_TOKEN = re.compile(r"(?P<id>[0-9a-f]{16})-(?P<secret>[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Session:
    """One sign-in; exactly one of ``key_id`` and ``account`` is set. ``address``: from where."""

    session_id: str
    secret_hash: str = field(repr=False)
    key_id: str | None
    account: str | None
    address: str
    created_at: datetime
    used_at: datetime
    expires_at: datetime

    @property
    def owner(self) -> str:
        """As the audit trail names it."""
        return f"key:{self.key_id}" if self.key_id is not None else f"account:{self.account}"

    def belongs_to(self, secret: str, now: datetime) -> bool:
        return hmac.compare_digest(self.secret_hash, hash_of(secret)) and now < self.expires_at


def split(token: str) -> tuple[str, str] | None:
    """(session_id, secret) of a session's token; None for anything else."""
    match = _TOKEN.fullmatch(token)
    return None if match is None else (match["id"], match["secret"])


def begin(c: Connection, owner: Key | Account, *, address: str) -> str:
    """Sign in: the token of a new session, which exists nowhere else. NotFoundError where the account has just gone,
    ConflictError where the key's name is somebody else's; see `names`."""
    now = datetime.now(UTC)
    if isinstance(owner, Key) and names.is_anothers(c, owner.key_id, owner.name, now):
        text = f"Another key or account is called {owner.name!r}, and picks under that name; ask for a key of another name."
        raise ConflictError(text, param="key")
    c.execute(sa.delete(sessions).where(sessions.c.expires_at <= now))
    session_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    if isinstance(owner, Account):
        if accounts.need(c, owner.name).password_hash != owner.password_hash:
            raise NotFoundError(f"the password of {owner.name!r} has just changed", param="name")
        c.execute(sa.update(account_rows).where(account_rows.c.name == owner.name).values(last_login_at=now))
    row = {
        "session_id": session_id,
        "secret_hash": hash_of(secret),
        "key_id": owner.key_id if isinstance(owner, Key) else None,
        "account": owner.name if isinstance(owner, Account) else None,
        "address": address[:64],
        "created_at": now,
        "used_at": now,
        "expires_at": now + LASTS,
    }
    c.execute(sa.insert(sessions), row)
    return f"{session_id}-{secret}"


def get(c: Connection, session_id: str) -> tuple[Session, Key | Account] | None:
    """A session and whose it is; None where it, or its owner, is no more, or the owner's name is somebody else's."""
    row = c.execute(sa.select(sessions).where(sessions.c.session_id == session_id)).first()
    if row is None:
        return None
    session = _session(row)
    owner: Key | Account | None
    owner = keys.get(c, session.key_id) if session.key_id is not None else accounts.get(c, str(session.account))
    if isinstance(owner, Key) and names.is_anothers(c, owner.key_id, owner.name, datetime.now(UTC)):
        return None
    return None if owner is None else (session, owner)


def prolong(c: Connection, session_id: str, at: datetime) -> None:
    """It is in use at ``at``: good for as long again."""
    c.execute(sa.update(sessions).where(sessions.c.session_id == session_id).values(used_at=at, expires_at=at + LASTS))


def list_(c: Connection, *, account: str | None = None, after: str | None = None, limit: int | None = None) -> list[Session]:
    """Those that are good, newest first. NotFoundError where there is no session ``after``."""
    good = sessions.c.expires_at > datetime.now(UTC)
    statement = sa.select(sessions).where(good).order_by(sessions.c.created_at.desc(), sessions.c.session_id).limit(limit)
    if account is not None:
        statement = statement.where(sessions.c.account == account)
    if after is not None:
        last = need(c, after, "after")
        same_time = sa.and_(sessions.c.created_at == last.created_at, sessions.c.session_id > last.session_id)
        statement = statement.where(sa.or_(sessions.c.created_at < last.created_at, same_time))
    return [_session(row) for row in c.execute(statement)]


def need(c: Connection, session_id: str, param: str = "session_id") -> Session:
    row = c.execute(sa.select(sessions).where(sessions.c.session_id == session_id)).first()
    if row is None:
        raise NotFoundError(f"no session {session_id!r}", param=param)
    return _session(row)


def log_out(c: Connection, session_id: str) -> None:
    """End one's own session."""
    c.execute(sa.delete(sessions).where(sessions.c.session_id == session_id))


def end(c: Connection, session_id: str, *, actor: str, reason: str) -> Session:
    """End somebody's session. NotFoundError for an unknown one."""
    session = need(c, session_id)
    log_out(c, session_id)
    audit.record(c, AuditAction.SESSION_END, actor=actor, subject=session.owner, reason=reason)
    return session


def _session(row: Row[Any]) -> Session:
    return Session(**{name: getattr(row, name) for name in Session.__slots__})
