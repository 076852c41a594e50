"""Replies kept by idempotency key, so that a request sent twice is done once. They are kept for a day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import stored_replies

RETENTION = timedelta(hours=24)

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
    """The reply that was kept less than a day ago."""
    row = c.execute(_GET, {"caller": caller, "key": idempotency_key}).first()
    if row is None or row.created_at <= now - RETENTION:
        return None
    return StoredReply(row.request_hash, row.status, row.headers, row.body, row.created_at, row.subject)


def put(c: Connection, caller: str, idempotency_key: str, reply: StoredReply) -> None:
    """Keep a reply, and throw away those older than a day."""
    c.execute(sa.delete(stored_replies).where(stored_replies.c.created_at <= reply.created_at - RETENTION))
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


def forget(c: Connection, subjects: Sequence[str]) -> None:
    """Throw away the replies about what was deleted."""
    c.execute(sa.delete(stored_replies).where(stored_replies.c.subject.in_(subjects)))
