"""What operators set of the schedule while everything runs; and whether a pending trigger was asked for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "schedule_changes",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("setting", sa.String(32), nullable=False),
        sa.Column("is_set", sa.Boolean(), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.Column("audit_seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["audit_seq"], ["audit.seq"], name="fk_schedule_changes_audit_seq"),
        sa.PrimaryKeyConstraint("seq", name="pk_schedule_changes"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_schedule_changes_policy_setting_seq", "schedule_changes", ["policy", "setting", "seq"])
    op.add_column("triggers", sa.Column("is_asked", sa.Boolean(), nullable=False, server_default=sa.true()))
