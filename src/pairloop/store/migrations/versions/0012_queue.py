"""The labelling queue: which comparison is shown to whom until when, and comparisons whose answer is known."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reservations",
        sa.Column("reservation_id", sa.String(64), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.Column("rater_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("first_index", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.Column("expires_at", sa.String(27), nullable=False),
        sa.Column("done_at", sa.String(27), nullable=True),
        sa.PrimaryKeyConstraint("reservation_id", name="pk_reservations"),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name="fk_reservations_group_id"),
    )
    op.create_index("ix_reservations_group_id", "reservations", ["group_id"])
    op.create_index("ix_reservations_policy_rater_id", "reservations", ["policy", "rater_id"])
    op.create_index("ix_reservations_expires_at", "reservations", ["expires_at"])
    op.create_table(
        "gold_items",
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("label", sa.String(16), nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.PrimaryKeyConstraint("group_id", name="pk_gold_items"),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name="fk_gold_items_group_id"),
    )
    op.create_index("ix_gold_items_policy_created_at", "gold_items", ["policy", "created_at"])
