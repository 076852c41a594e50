"""Uploaded files, the fine-tuning jobs that use them, and what happened to these."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Boolean, Column, ForeignKey, Index, Integer, String, Table, Text, UniqueConstraint

from pairloop.store.columns import UtcDateTime
from pairloop.store.schema.base import Sequence, metadata

files = Table(
    "files",
    metadata,
    Column("file_id", String(64), primary_key=True),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("path", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("status_details", Text),
    Column("created_at", UtcDateTime, nullable=False),
    # The row stays as what a job's lineage names; the content is gone.
    Column("deleted_at", UtcDateTime),
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("status", String(32), nullable=False),
    Column("model", Text, nullable=False),
    Column("policy", String(64), nullable=False),
    # Where the model is not this server's own: which base the lineage ``policy`` was begun on.
    Column("base_model", Text),
    Column("parent", Integer, nullable=False),
    Column("training_file", String(64), ForeignKey("files.file_id"), nullable=False),
    Column("validation_file", String(64), ForeignKey("files.file_id")),
    Column("method", JSON, nullable=False),
    Column("suffix", String(64)),
    Column("seed", BigInteger, nullable=False),
    Column("metadata", JSON),
    Column("paused", Boolean, nullable=False),
    Column("owner", Text),
    Column("lease_expires_at", UtcDateTime),
    Column("heartbeat_at", UtcDateTime),
    Column("attempt", Integer, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id")),
    Column("fine_tuned_model", String(255)),
    Column("trained_tokens", BigInteger),
    Column("result_files", JSON, nullable=False),
    Column("error", JSON),
    Column("created_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Index(None, "status", "job_id"),
    Index(None, "dataset_id"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("seq", Sequence, primary_key=True),
    Column("event_id", String(64), nullable=False),
    Column("job_id", String(64), ForeignKey("jobs.job_id"), nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("event_id"),
    Index(None, "job_id", "seq"),
    sqlite_autoincrement=True,
)
