"""Turns of the loop: cycles and their steps, duels and verdicts, who holds what, what begins the next one."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    true,
)

from pairloop.store.columns import UtcDateTime
from pairloop.store.schema.base import Sequence, metadata

cycles = Table(
    "cycles",
    metadata,
    Column("cycle_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("parent", Integer, nullable=False),
    Column("trigger", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("policy", "number"),
)

cycle_steps = Table(
    "cycle_steps",
    metadata,
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("state", String(32), nullable=False),
    Column("record", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

duels = Table(
    "duels",
    metadata,
    Column("duel_id", String(64), primary_key=True),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id"), nullable=False),
    Column("policy", String(64), nullable=False),
    Column("champion", Integer, nullable=False),
    Column("challenger", Integer, nullable=False),
    Column("opened_at", UtcDateTime, nullable=False),
    Column("closed_at", UtcDateTime),
    Column("kind", String(8), nullable=False, server_default="gate"),
    Index(None, "policy", "closed_at"),
    Index(None, "policy", "opened_at"),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("seq", Sequence, primary_key=True),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id"), nullable=False),
    Column("duel_id", String(64), ForeignKey("duels.duel_id")),
    Column("kind", String(16), nullable=False),
    Column("reasons", JSON, nullable=False),
    Column("e_value", Float(53), nullable=False),
    Column("wins", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("ties", Integer, nullable=False),
    Column("raters", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "cycle_id", "seq"),
    sqlite_autoincrement=True,
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("owner", Text),
    # Fencing token: rises with every change of owner and is never reused.
    Column("token", BigInteger, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
)

triggers = Table(
    "triggers",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # False where the clock or new pairs put it there.
    Column("is_asked", Boolean, nullable=False, server_default=true()),
)

# What operators set of the schedule: the newest row of a setting holds, and without is_set the file's value does.
# By whom, when and why is in the audit trail, and only there.
schedule_changes = Table(
    "schedule_changes",
    metadata,
    Column("seq", Sequence, primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("setting", String(32), nullable=False),
    Column("is_set", Boolean, nullable=False),
    Column("value", JSON, nullable=False),
    Column("audit_seq", Sequence, ForeignKey("audit.seq"), nullable=False),
    Index(None, "policy", "setting", "seq"),
    sqlite_autoincrement=True,
)
