"""Keys of callers: what each may do and until when. Of the secret only a hash is kept.

A plain SHA-256 is enough for it: the secret is 256 random bits, so that nobody can guess towards its hash as towards a
password's, and a slow function would only cost each request its time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.store import audit, names
from pairloop.store.audit import AuditAction
from pairloop.store.schema import keys, sessions
from pairloop.store.subjects import is_reserved

PREFIX = "sk-pairloop-"
LONGEST_NAME = 128
_PUBLIC_BYTES, _SECRET_BYTES = 8, 32
_TOKEN = re.compile(rf"{PREFIX}(?P<public>[0-9a-f]{{{2 * _PUBLIC_BYTES}}})-(?P<secret>[0-9a-f]{{{2 * _SECRET_BYTES}}})")
_GET = sa.select(keys).where(keys.c.key_id == sa.bindparam("key_id"))


class Scope(StrEnum):
    """What a key may do; ``rate``: chat and label on the pages. ``admin`` may do everything."""

    INFERENCE = "inference"
    FEEDBACK = "feedback"
    RATE = "rate"
    OPERATE = "operate"
    TRAIN = "train"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is stored; ``key_id`` is the public part of its token."""

    key_id: str
    name: str
    secret_hash: str = field(repr=False)
    scopes: frozenset[Scope]
    requests_per_minute: int | None
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None

    def allows(self, wanted: Collection[Scope]) -> bool:
        """Whether one of the wanted scopes is among its own."""
        return Scope.ADMIN in self.scopes or not self.scopes.isdisjoint(wanted)

    def refusal(self, secret: str, now: datetime) -> str | None:
        """Why this key is not good with this secret, or None."""
        if not hmac.compare_digest(self.secret_hash, hash_of(secret)):
            return "is not known"
        return self.ended(now)

    def ended(self, now: datetime) -> str | None:
        """Why this key is no longer good, or None."""
        if self.revoked_at is not None:
            return "was revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "has expired"
        return None


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def split(token: str) -> tuple[str, str] | None:
    """(key_id, secret) of ``sk-pairloop-<public>-<secret>``; None for anything else."""
    match = _TOKEN.fullmatch(token)
    return None if match is None else (match["public"], match["secret"])


def new(
    name: str | None,
    scopes: Collection[Scope],
    *,
    expires_at: datetime | None = None,
    requests_per_minute: int | None = None,
) -> tuple[Key, str]:
    """A new key and its token, which exists nowhere else. InvalidRequestError names the field that cannot be.

    Without a name it is called after its id.
    """
    now = datetime.now(UTC)
    public, secret = secrets.token_hex(_PUBLIC_BYTES), secrets.token_hex(_SECRET_BYTES)
    name = f"unnamed {public}" if name is None else name
    if not name.strip() or len(name) > LONGEST_NAME:
        raise InvalidRequestError(f"the name of a key has 1 to {LONGEST_NAME} characters", param="name")
    if is_reserved(name.strip()):
        raise InvalidRequestError(f"a key may not be called {name!r}: so an operator's own vote is recorded", param="name")
    if not scopes:
        raise InvalidRequestError(f"a key without scopes opens nothing; choose from {', '.join(Scope)}", param="scopes")
    if expires_at is not None and expires_at <= now:
        raise InvalidRequestError(f"the key would have expired already, at {expires_at.isoformat()}", param="expires_at")
    key = Key(public, name.strip(), hash_of(secret), frozenset(scopes), requests_per_minute, now, expires_at)
    return key, f"{PREFIX}{public}-{secret}"


def create(c: Connection, key: Key, *, actor: str, reason: str) -> None:
    """Write a new key, with its line in the audit trail. ConflictError where its name is taken; see `names`."""
    names.refuse_taken(c, key.name, key.created_at)
    insert(c, key)
    details = {"name": key.name, "scopes": sorted(key.scopes)}
    audit.record(c, AuditAction.KEY_CREATE, actor=actor, subject=f"key:{key.key_id}", reason=reason, details=details)


def insert(c: Connection, key: Key) -> None:
    c.execute(
        sa.insert(keys),
        {
            "key_id": key.key_id,
            "name": key.name,
            "secret_hash": key.secret_hash,
            "scopes": sorted(key.scopes),
            "requests_per_minute": key.requests_per_minute,
            "created_at": key.created_at,
            "expires_at": key.expires_at,
        },
    )


def get(c: Connection, key_id: str) -> Key | None:
    row = c.execute(_GET, {"key_id": key_id}).first()
    return None if row is None else _key(row)


def any_(c: Connection) -> bool:
    """Whether a key was ever made, revoked and expired ones included: what was locked once stays locked."""
    return c.execute(sa.select(keys.c.key_id).limit(1)).first() is not None


def list_(c: Connection, *, after: str | None = None, limit: int | None = None) -> list[Key]:
    """Newest first; those that follow the key ``after``, at most ``limit``. NotFoundError where there is no such key."""
    statement = sa.select(keys).order_by(keys.c.created_at.desc(), keys.c.key_id).limit(limit)
    if after is not None:
        last = get(c, after)
        if last is None:
            raise NotFoundError(f"no key {after!r}", param="after")
        same_time = sa.and_(keys.c.created_at == last.created_at, keys.c.key_id > last.key_id)
        statement = statement.where(sa.or_(keys.c.created_at < last.created_at, same_time))
    return [_key(row) for row in c.execute(statement)]


def names_of(c: Connection, key_ids: Collection[str]) -> dict[str, str]:
    """What keys are called, by id."""
    found = sa.select(keys.c.key_id, keys.c.name).where(keys.c.key_id.in_(key_ids))
    return {row.key_id: row.name for row in c.execute(found)} if key_ids else {}


def revoke(c: Connection, key_id: str, at: datetime, *, actor: str, reason: str) -> Key:
    """Revoke a key for good, and end its sessions; a second time changes nothing. NotFoundError for an unknown one."""
    was_good = c.execute(sa.update(keys).where(keys.c.key_id == key_id, keys.c.revoked_at.is_(None)).values(revoked_at=at))
    key = get(c, key_id)
    if key is None:
        raise NotFoundError(f"no key {key_id!r}", param="key_id")
    if was_good.rowcount:
        c.execute(sa.delete(sessions).where(sessions.c.key_id == key_id))
        details = {"name": key.name}
        audit.record(c, AuditAction.KEY_REVOKE, actor=actor, subject=f"key:{key_id}", reason=reason, details=details, at=at)
    return key


def touch(c: Connection, used_at: Mapping[str, datetime]) -> None:
    """Note when keys were last used."""
    for key_id, at in used_at.items():
        c.execute(sa.update(keys).where(keys.c.key_id == key_id).values(last_used_at=at))


def _key(row: Row[Any]) -> Key:
    return Key(
        key_id=row.key_id,
        name=row.name,
        secret_hash=row.secret_hash,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        requests_per_minute=row.requests_per_minute,
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
    )
