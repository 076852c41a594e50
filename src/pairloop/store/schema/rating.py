"""What people and judges said, whose votes count, what the labelling queue shows, what an operator decided and looks at."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Boolean, Column, ForeignKey, Index, Integer, String, Table, Text, UniqueConstraint

from pairloop.store.columns import JsonText, UtcDateTime
from pairloop.store.schema.base import Sequence, metadata

feedback = Table(
    "feedback",
    metadata,
    Column("seq", Sequence, primary_key=True),
    Column("feedback_id", String(255), nullable=False),
    Column("group_id", String(255), ForeignKey("groups.group_id"), nullable=False),
    Column("policy", String(64), nullable=False),
    Column("metric", String(64), nullable=False),
    Column("source", String(16), nullable=False),
    Column("rater_id", Text, nullable=False),
    Column("label", String(16)),
    # -1 stands for the group as a whole: NULLs never equal each other in a unique constraint.
    Column("choice_index", Integer, nullable=False),
    Column("value", JsonText),
    Column("text", Text),
    Column("shown_order", JSON, nullable=False),
    Column("latency_ms", BigInteger),
    Column("revision", Integer, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("feedback_id"),
    UniqueConstraint("group_id", "rater_id", "metric", "choice_index", "revision"),
    Index(None, "policy", "seq"),
    Index(None, "policy", "rater_id"),
    sqlite_autoincrement=True,
)

quarantines = Table(
    "quarantines",
    metadata,
    Column("seq", Sequence, primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("rater_id", Text, nullable=False),
    Column("action", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "seq"),
    sqlite_autoincrement=True,
)

# What the labelling queue shows to whom, until when; deleted a day after it ends.
reservations = Table(
    "reservations",
    metadata,
    Column("reservation_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("group_id", String(255), ForeignKey("groups.group_id"), nullable=False),
    Column("rater_id", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    # Which answer stands in the first place.
    Column("first_index", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("done_at", UtcDateTime),
    Index(None, "group_id"),
    Index(None, "policy", "rater_id"),
    Index(None, "expires_at"),
)

# Comparisons whose answer is known; what was marked and taken back, and why, is in the audit trail.
gold_items = Table(
    "gold_items",
    metadata,
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("label", String(16), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "created_at"),
)

# What an operator decided about single groups: not to train on them, to show them to raters again. The newest row holds.
marks = Table(
    "marks",
    metadata,
    Column("seq", Sequence, primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("group_id", String(255), ForeignKey("groups.group_id"), nullable=False),
    Column("mark", String(16), nullable=False),
    Column("is_set", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "group_id", "mark", "seq"),
    Index(None, "policy", "mark", "seq"),
    sqlite_autoincrement=True,
)

# Named sets of filters over the preferences.
saved_views = Table(
    "saved_views",
    metadata,
    Column("view_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("filters", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("policy", "name"),
)
