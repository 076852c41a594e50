"""Snapshots of training rows, where each row came from, what they left out, and the runs that train on them."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, Integer, String, Table, Text

from pairloop.store.columns import UtcDateTime
from pairloop.store.schema.base import metadata

datasets = Table(
    "datasets",
    metadata,
    Column("dataset_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id")),
    Column("path", Text, nullable=False),
    Column("n_train", Integer, nullable=False),
    Column("n_heldout", Integer, nullable=False),
    Column("counts", JSON, nullable=False),
    Column("dropped", JSON, nullable=False),
    Column("feedback_seq", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "created_at"),
)

dataset_pairs = Table(
    "dataset_pairs",
    metadata,
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id"), primary_key=True),
    Column("pair_id", String(255), primary_key=True),
    Index(None, "pair_id"),
)

pair_groups = Table(
    "pair_groups",
    metadata,
    Column("pair_id", String(255), primary_key=True),
    Column("group_id", String(255), ForeignKey("groups.group_id"), primary_key=True),
    Index(None, "group_id"),
)

pair_feedback = Table(
    "pair_feedback",
    metadata,
    Column("pair_id", String(255), primary_key=True),
    Column("feedback_id", String(255), ForeignKey("feedback.feedback_id"), primary_key=True),
    Index(None, "feedback_id"),
)

# Why a feedback row became part of no training row, as the last dataset that looked at it said.
set_aside = Table(
    "set_aside",
    metadata,
    Column("feedback_id", String(255), ForeignKey("feedback.feedback_id"), primary_key=True),
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id"), nullable=False),
    Column("reason", String(32), nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("cycle_id", String(64), ForeignKey("cycles.cycle_id")),
    Column("dataset_id", String(64), ForeignKey("datasets.dataset_id"), nullable=False),
    Column("parent", Integer, nullable=False),
    Column("status", String(32), nullable=False),
    Column("owner", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("lease_expires_at", UtcDateTime, nullable=False),
    Column("heartbeat_at", UtcDateTime, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("result", JSON, nullable=False),
    Column("error", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "policy", "created_at"),
    Index(None, "cycle_id", "attempt"),
)
