"""Who may come in, the replies that are kept for them, and what was done to the loop by whom."""

from __future__ import annotations

from sqlalchemy import JSON, Column, ForeignKey, Index, Integer, LargeBinary, String, Table, Text

from pairloop.store.columns import UtcDateTime
from pairloop.store.schema.base import Sequence, metadata

keys = Table(
    "keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("secret_hash", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("requests_per_minute", Integer),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
)

# A removed account keeps its row, without its password: the audit trail names it.
accounts = Table(
    "accounts",
    metadata,
    Column("name", String(48), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("password_hash", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_login_at", UtcDateTime),
    Column("removed_at", UtcDateTime),
)

# Who is signed in, by a key or an account; the row goes when the session ends.
sessions = Table(
    "sessions",
    metadata,
    Column("session_id", String(64), primary_key=True),
    Column("secret_hash", String(64), nullable=False),
    Column("key_id", String(64), ForeignKey("keys.key_id")),
    Column("account", String(48), ForeignKey("accounts.name")),
    Column("address", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("used_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Index(None, "created_at", "session_id"),
)

stored_replies = Table(
    "stored_replies",
    metadata,
    Column("caller", String(64), primary_key=True),
    Column("idempotency_key", String(255), primary_key=True),
    Column("request_hash", String(64), nullable=False),
    # What the reply is about, by its id: a completion that is deleted takes the replies that hold its text with it.
    Column("subject", String(255)),
    Column("status", Integer, nullable=False),
    Column("headers", JSON, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "created_at"),
    Index(None, "subject"),
)

# What was done to the loop, by whom and why.
audit = Table(
    "audit",
    metadata,
    Column("seq", Sequence, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("details", JSON, nullable=False),
    Index(None, "action", "seq"),
    sqlite_autoincrement=True,
)
