"""Quarantines: which raters' votes are set aside, and why."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "quarantines",
        sa.Column("seq", _SEQUENCE, nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("rater_id", sa.Text(), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_quarantines"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_quarantines_policy_seq", "quarantines", ["policy", "seq"])
