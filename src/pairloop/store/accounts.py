"""Accounts of people: a name, a password and a role. Of the password only a salted scrypt hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.store import audit, keys, names
from pairloop.store.audit import AuditAction
from pairloop.store.keys import Scope
from pairloop.store.schema import accounts, sessions

SHORTEST_PASSWORD, LONGEST_PASSWORD = 12, 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,47}")


class Role(StrEnum):
    """What a person may do here."""

    RATE = "rate"
    OPERATE = "operate"
    ADMIN = "admin"


SCOPES_OF: Mapping[Role, frozenset[Scope]] = {
    # Asking and picking go with it; "inference" would also open stored conversations by the ids that the queue tells.
    Role.RATE: frozenset({Scope.RATE}),
    Role.OPERATE: frozenset({Scope.RATE, Scope.INFERENCE, Scope.FEEDBACK, Scope.OPERATE, Scope.TRAIN}),
    Role.ADMIN: frozenset(Scope),
}


class Cost(NamedTuple):
    """What one guess costs, in scrypt's own parameters (RFC 7914): 128·n·r bytes, and p times over."""

    n: int
    r: int
    p: int


COST = Cost(2**14, 8, 5)
"""16 MB and about a fifth of a second (OWASP's password storage sheet)."""


@dataclass(frozen=True, slots=True)
class Account:
    """An account as it is stored; a removed one has no password."""

    name: str
    role: Role
    password_hash: str = field(repr=False)
    created_at: datetime
    last_login_at: datetime | None = None
    removed_at: datetime | None = None

    @property
    def scopes(self) -> frozenset[Scope]:
        return SCOPES_OF[self.role]


def hash_password(password: str) -> str:
    """``scrypt$n$r$p$salt$hash``; InvalidRequestError for one that is too short or too long. Slow on purpose."""
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        text = f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters; this one has {len(password)}"
        raise InvalidRequestError(text, param="password")
    salt = secrets.token_bytes(16)
    return "$".join(("scrypt", *map(str, COST), salt.hex(), _scrypt(password, salt, COST).hex()))


def matches(account: Account | None, password: str) -> bool:
    """Whether this is the account's password. Takes as long where there is no such account."""
    stored = account.password_hash if account is not None else ""
    kind, *parts = stored.split("$") if stored else ("scrypt", *map(str, COST), "00" * 16, "00" * 32)
    n, r, p, salt, digest = parts
    found = _scrypt(password[:LONGEST_PASSWORD], bytes.fromhex(salt), Cost(int(n), int(r), int(p)))
    return hmac.compare_digest(found.hex(), digest) and kind == "scrypt" and bool(stored)


def _scrypt(password: str, salt: bytes, cost: Cost) -> bytes:
    """The same password typed on another keyboard is the same: normalized as NIST SP 800-63B asks."""
    text = unicodedata.normalize("NFKC", password).encode(errors="replace")
    maxmem = 256 * cost.n * cost.r + (1 << 20)
    return hashlib.scrypt(text, salt=salt, n=cost.n, r=cost.r, p=cost.p, maxmem=maxmem, dklen=32)


def create(c: Connection, name: str, role: Role, password_hash: str, *, actor: str, reason: str) -> Account:
    """A new account, or a removed one that comes back. ConflictError where there is one, or a good key, of this name."""
    if _NAME.fullmatch(name) is None:
        text = f"an account's name has 1 to 48 of a-z, A-Z, 0-9, '.', '_', '@' and '-', a letter or digit first; not {name!r}"
        raise InvalidRequestError(text, param="name")
    names.refuse_taken(c, name, datetime.now(UTC))
    row = {"role": role.value, "password_hash": password_hash, "created_at": datetime.now(UTC), "last_login_at": None}
    known = c.execute(sa.select(accounts).where(accounts.c.name == name)).first()
    if known is None:
        c.execute(sa.insert(accounts), {"name": name, **row})
    else:
        c.execute(sa.update(accounts).where(accounts.c.name == name).values(removed_at=None, **row))
    _record(c, AuditAction.ACCOUNT_CREATE, name, actor, reason, {"role": role.value})
    return need(c, name)


def change(
    c: Connection, name: str, *, role: Role | None = None, password_hash: str | None = None, actor: str, reason: str
) -> Account:
    """Give an account another role, or another password, which ends its sessions. NotFoundError for an unknown one."""
    account = need(c, name)
    values: dict[str, Any] = {}
    if role is not None and role is not account.role:
        values["role"] = role.value
    if password_hash is not None:
        values["password_hash"] = password_hash
        c.execute(sa.delete(sessions).where(sessions.c.account == name))
    if not values:
        return account
    c.execute(sa.update(accounts).where(accounts.c.name == name).values(values))
    details = {"role": role.value, "previous": account.role.value} if "role" in values and role is not None else {}
    _record(c, AuditAction.ACCOUNT_CHANGE, name, actor, reason, {**details, "password": password_hash is not None})
    return need(c, name)


def remove(c: Connection, name: str, *, actor: str, reason: str) -> Account:
    """End an account, its password and its sessions. NotFoundError for an unknown one."""
    account = need(c, name)
    gone = {"password_hash": "", "removed_at": datetime.now(UTC)}
    c.execute(sa.delete(sessions).where(sessions.c.account == name))
    c.execute(sa.update(accounts).where(accounts.c.name == name).values(gone))
    _record(c, AuditAction.ACCOUNT_REMOVE, name, actor, reason, {"role": account.role.value})
    return account


def get(c: Connection, name: str) -> Account | None:
    """The account of a name, unless it was removed."""
    row = c.execute(sa.select(accounts).where(accounts.c.name == name, accounts.c.removed_at.is_(None))).first()
    return None if row is None else _account(row)


def need(c: Connection, name: str, param: str = "name") -> Account:
    account = get(c, name)
    if account is None:
        raise NotFoundError(f"no account {name!r}", param=param)
    return account


def list_(c: Connection, *, after: str | None = None, limit: int | None = None) -> list[Account]:
    """By name, removed ones left out; those that follow the account ``after``."""
    statement = sa.select(accounts).where(accounts.c.removed_at.is_(None)).order_by(accounts.c.name).limit(limit)
    if after is not None:
        statement = statement.where(accounts.c.name > need(c, after, "after").name)
    return [_account(row) for row in c.execute(statement)]


def is_locked(c: Connection) -> bool:
    """Whether a key or an account was ever made: what was locked once stays locked."""
    return keys.any_(c) or c.execute(sa.select(accounts.c.name).limit(1)).first() is not None


def _record(c: Connection, action: AuditAction, name: str, actor: str, reason: str, details: Mapping[str, Any]) -> None:
    audit.record(c, action, actor=actor, subject=f"account:{name}", reason=reason, details=details)


def _account(row: Row[Any]) -> Account:
    return Account(
        name=row.name,
        role=Role(row.role),
        password_hash=row.password_hash,
        created_at=row.created_at,
        last_login_at=row.last_login_at,
        removed_at=row.removed_at,
    )
