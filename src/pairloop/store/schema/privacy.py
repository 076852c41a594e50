"""What was deleted: people, and the artifacts that held them; which versions learned from them."""

from __future__ import annotations

from sqlalchemy import JSON, Column, ForeignKey, ForeignKeyConstraint, Integer, String, Table, Text

from pairloop.store.columns import UtcDateTime
from pairloop.store.schema.base import metadata

# Who was erased, as a salted hash: a row can be matched by hashing its user, and nobody can be read out of it.
erasures = Table(
    "erasures",
    metadata,
    Column("erasure_id", String(64), primary_key=True),
    Column("salt", String(32), nullable=False),
    Column("subject_hash", String(64), nullable=False),
    Column("reason", Text, nullable=False),
    Column("counts", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

version_marks = Table(
    "version_marks",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("erasure_id", String(64), ForeignKey("erasures.erasure_id"), primary_key=True),
    Column("rows", Integer, nullable=False),
    ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"]),
)

# Artifact folders that were removed on purpose; of a dataset, the one that holds what is left of its rows.
removed_artifacts = Table(
    "removed_artifacts",
    metadata,
    Column("path", String(255), primary_key=True),
    Column("reason", String(32), nullable=False),
    Column("successor", String(64), ForeignKey("datasets.dataset_id")),
    Column("created_at", UtcDateTime, nullable=False),
    Column("cleared_at", UtcDateTime),  # when the folder's files were gone
)
