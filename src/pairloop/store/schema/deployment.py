"""Versions, which of them answer, what they said, and what was seen of their live answers."""

from __future__ import annotations

from sqlalchemy import JSON, Column, Float, ForeignKey, ForeignKeyConstraint, Index, Integer, String, Table, Text

from pairloop.store.columns import UtcDateTime
from pairloop.store.schema.base import Sequence, metadata

versions = Table(
    "versions",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("path", Text, nullable=False),
    Column("artifact_hash", String(128), nullable=False),
    Column("parent", Integer),
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id")),
    Column("run_id", String(64), ForeignKey("runs.run_id")),
    Column("created_at", UtcDateTime, nullable=False),
    # Of versions that a fine-tuning job made, with recipe and result (record); step number and metrics of its checkpoints.
    # SQLite cannot add a foreign key.
    Column("job_id", String(64)),
    Column("step_number", Integer),
    Column("model_name", String(255)),
    Column("metrics", JSON),
    Column("record", JSON),
    ForeignKeyConstraint(["policy", "parent"], ["versions.policy", "versions.number"]),
    Index("uq_versions_model_name", "model_name", unique=True),
    Index(None, "job_id"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("alias", String(16), primary_key=True),
    Column("number", Integer, nullable=False),
    ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"]),
)

promotions = Table(
    "promotions",
    metadata,
    Column("seq", Sequence, primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("previous", Integer),
    Column("action", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id")),
    Column("created_at", UtcDateTime, nullable=False),
    ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"]),
    Index(None, "policy", "seq"),
    sqlite_autoincrement=True,
)

# What a version and the champion of then said to some prompts of its offline report. The prompt stands in its group; a row
# goes when that group's texts are erased.
samples = Table(
    "samples",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("group_id", String(255), ForeignKey("groups.group_id"), nullable=False),
    Column("against", Integer, nullable=False),
    Column("ours", Text, nullable=False),
    Column("theirs", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"]),
    Index(None, "group_id"),
)

canaries = Table(
    "canaries",
    metadata,
    Column("canary_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("champion", Integer, nullable=False),
    # Which users it answers: those whose hash with the salt is below the share.
    Column("share", Float(53), nullable=False),
    Column("salt", String(32), nullable=False),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id")),
    Column("reason", Text, nullable=False),
    Column("opened_at", UtcDateTime, nullable=False),
    Column("closed_at", UtcDateTime),
    Column("outcome", String(16)),
    Column("outcome_reason", Text),
    ForeignKeyConstraint(["policy", "version"], ["versions.policy", "versions.number"]),
    Index(None, "policy", "closed_at"),
    Index(None, "policy", "opened_at"),
)

# What each process saw of each version's live answers, minute by minute; the row of a minute that is over does not change.
traffic = Table(
    "traffic",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("minute", UtcDateTime, primary_key=True),
    Column("process", String(128), primary_key=True),
    Column("answers", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("refusals", Integer, nullable=False),
    Column("unseen", Integer),  # NULL before this was told apart
    # Counts by class of a logarithmic scale: milliseconds per token, and tokens per answer.
    Column("latency", JSON, nullable=False),
    Column("length", JSON, nullable=False),
    Index(None, "minute"),
)
