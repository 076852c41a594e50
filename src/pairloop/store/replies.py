"""Replies kept by idempotency key, so that a request sent twice is done once. They are kept for a day.

A key is taken before the request is done: of several servers on one database, one does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection

from pairloop.store.schema import stored_replies

RETENTION = timedelta(hours=24)
UNDER_WAY = 0
"""The status of a row whose request is not answered yet; its header ``owner`` says who does it."""

_GET = sa.select(stored_replies).where(
    stored_replies.c.caller == sa.bindparam("caller"), stored_replies.c.idempotency_key == sa.bindparam("key")
)


@dataclass(frozen=True, slots=True)
class StoredReply:
    """What was answered, and a hash of what had been asked; ``subject``: the id of what the reply is about."""

    request_hash: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    created_at: datetime
    subject: str | None = None


def get(c: Connection, caller: str, idempotency_key: str, *, now: datetime) -> StoredReply | None:
    """The reply that was kept less than a day ago, or the row of a request that is under way (`UNDER_WAY`)."""
    row = c.execute(_GET, {"caller": caller, "key": idempotency_key}).first()
    if row is None or row.created_at <= now - RETENTION:
        return None
    return StoredReply(row.request_hash, row.status, row.headers, row.body, row.created_at, row.subject)


def take(
    c: Connection, caller: str, idempotency_key: str, owner: str, *, now: datetime, is_gone: Callable[[StoredReply], bool]
) -> StoredReply | None:
    """Take the key for a request that is to be done; what stands under it where somebody else took it, and is not gone."""
    found = get(c, caller, idempotency_key, now=now)
    if found is not None and not (found.status == UNDER_WAY and is_gone(found)):
        return found
    _write(c, caller, idempotency_key, StoredReply("", UNDER_WAY, {"owner": owner}, b"", now))
    return None


def release(c: Connection, caller: str, idempotency_key: str, owner: str) -> None:
    """Give the key back: the request was refused or failed, and may be tried again. Does nothing where another one has it."""
    row = c.execute(_GET, {"caller": caller, "key": idempotency_key}).first()
    if row is not None and row.status == UNDER_WAY and row.headers["owner"] == owner:
        c.execute(sa.delete(stored_replies).where(*_this(caller, idempotency_key)))


def put(c: Connection, caller: str, idempotency_key: str, reply: StoredReply) -> None:
    """Keep a reply, and throw away those older than a day."""
    c.execute(sa.delete(stored_replies).where(stored_replies.c.created_at <= reply.created_at - RETENTION))
    _write(c, caller, idempotency_key, reply)


def _write(c: Connection, caller: str, idempotency_key: str, reply: StoredReply) -> None:
    c.execute(sa.delete(stored_replies).where(*_this(caller, idempotency_key)))
    c.execute(
        sa.insert(stored_replies),
        {
            "caller": caller,
            "idempotency_key": idempotency_key,
            "request_hash": reply.request_hash,
            "subject": reply.subject,
            "status": reply.status,
            "headers": dict(reply.headers),
            "body": reply.body,
            "created_at": reply.created_at,
        },
    )


def _this(caller: str, idempotency_key: str) -> tuple[ColumnElement[bool], ...]:
    return (stored_replies.c.caller == caller, stored_replies.c.idempotency_key == idempotency_key)


def forget(c: Connection, subjects: Sequence[str]) -> None:
    """Throw away the replies about what was deleted."""
    c.execute(sa.delete(stored_replies).where(stored_replies.c.subject.in_(subjects)))
