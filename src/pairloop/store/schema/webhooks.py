"""What happened, and to which webhooks it is told."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, Integer, String, Table, Text, UniqueConstraint

from pairloop.store.columns import UtcDateTime
from pairloop.store.schema.base import Sequence, metadata

events = Table(
    "events",
    metadata,
    Column("seq", Sequence, primary_key=True),
    Column("event_id", String(64), nullable=False),
    Column("type", String(64), nullable=False),
    Column("policy", String(64), nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("event_id"),
    sqlite_autoincrement=True,
)

webhook_cursors = Table(
    "webhook_cursors",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("endpoint", String(64), primary_key=True),
    # What happened up to here is not told: it was before the endpoint was named.
    Column("begin_seq", BigInteger, nullable=False),
    Column("seen_seq", BigInteger, nullable=False),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("endpoint", String(64), primary_key=True),
    Column("event_id", String(64), ForeignKey("events.event_id"), primary_key=True),
    Column("status", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", UtcDateTime, nullable=False),
    Column("error", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Index(None, "status", "next_at"),
)
