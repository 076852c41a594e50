"""Deployment: the audit trail, canaries, and what each version's live answers were like."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", _SEQUENCE, nullable=False),
        sa.Column("at", sa.String(27), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_action_seq", "audit", ["action", "seq"])
    op.create_table(
        "canaries",
        sa.Column("canary_id", sa.String(64), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("champion", sa.Integer(), nullable=False),
        sa.Column("share", sa.Float(53), nullable=False),
        sa.Column("salt", sa.String(32), nullable=False),
        sa.Column("cycle_id", sa.String(64), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("opened_at", sa.String(27), nullable=False),
        sa.Column("closed_at", sa.String(27), nullable=True),
        sa.Column("outcome", sa.String(16), nullable=True),
        sa.Column("outcome_reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("canary_id", name="pk_canaries"),
        sa.ForeignKeyConstraint(["cycle_id"], ["cycles.cycle_id"], name="fk_canaries_cycle_id"),
        sa.ForeignKeyConstraint(
            ["policy", "version"], ["versions.policy", "versions.number"], name="fk_canaries_policy_version"
        ),
    )
    op.create_index("ix_canaries_policy_closed_at", "canaries", ["policy", "closed_at"])
    op.create_index("ix_canaries_policy_opened_at", "canaries", ["policy", "opened_at"])
    op.create_table(
        "traffic",
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("minute", sa.String(27), nullable=False),
        sa.Column("process", sa.String(128), nullable=False),
        sa.Column("answers", sa.Integer(), nullable=False),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("refusals", sa.Integer(), nullable=False),
        sa.Column("latency", sa.JSON(), nullable=False),
        sa.Column("length", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("policy", "version", "minute", "process", name="pk_traffic"),
    )
    op.create_index("ix_traffic_minute", "traffic", ["minute"])
