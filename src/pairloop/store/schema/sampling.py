"""What was asked and answered: groups, their completions, and what the wire lists of them."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, ForeignKey, Index, Integer, String, Table, Text

from pairloop.store.columns import LogProbs, TokenIds, UtcDateTime
from pairloop.store.schema.base import metadata

groups = Table(
    "groups",
    metadata,
    Column("group_id", String(255), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("pool", String(16), nullable=False),
    Column("prompt", JSON, nullable=False),
    Column("prompt_hash", String(32), nullable=False),
    Column("prompt_token_ids", TokenIds, nullable=False),
    Column("sampling", JSON, nullable=False),
    Column("user", Text),
    Column("conversation_id", Text),
    Column("parent_group_id", String(255)),
    Column("parent_index", Integer),
    Column("duel_id", String(64), ForeignKey("duels.duel_id")),
    Column("metadata", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "created_at"),
    Index(None, "policy", "pool", "created_at"),
    Index(None, "duel_id"),
    Index(None, "conversation_id"),
)

completions = Table(
    "completions",
    metadata,
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),
    Column("token_ids", TokenIds, nullable=False),
    Column("logps", LogProbs, nullable=False),
    Column("version", Integer),
    Column("finish_reason", String(16), nullable=False),
    # A hash of policy, user and text with the group's time: finds the answer that a conversation goes on from in one probe.
    Column("answer_key", String(32), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # NULL says no.
    Column("is_redacted", Boolean),
    # From the request's arrival; NULL where nobody looked at a clock.
    Column("first_token_ms", Integer),
    Column("total_ms", Integer),
    Index(None, "answer_key", "created_at"),
)

stored_completions = Table(
    "stored_completions",
    metadata,
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("model", String(128), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("is_listed", Boolean, nullable=False),
    Column("deleted_at", UtcDateTime),
    Index(None, "policy", "is_listed", "group_id"),
    Index(None, "policy", "model", "is_listed", "group_id"),
)

# The pairs of listed completions alone, one row each: what a listing by metadata is read from.
stored_metadata = Table(
    "stored_metadata",
    metadata,
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("value", Text, nullable=False),
    Index(None, "policy", "key", "value", "group_id"),
)
