"""Why feedback was not used, what an operator decided about groups, and saved views."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "set_aside",
        sa.Column("feedback_id", sa.String(255), nullable=False),
        sa.Column("dataset_id", sa.String(64), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["feedback_id"], ["feedback.feedback_id"], name="fk_set_aside_feedback_id"),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.dataset_id"], name="fk_set_aside_dataset_id"),
        sa.PrimaryKeyConstraint("feedback_id", name="pk_set_aside"),
    )
    op.create_table(
        "marks",
        sa.Column("seq", _SEQUENCE, nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.Column("mark", sa.String(16), nullable=False),
        sa.Column("is_set", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name="fk_marks_group_id"),
        sa.PrimaryKeyConstraint("seq", name="pk_marks"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_marks_group_id_mark_seq", "marks", ["group_id", "mark", "seq"])
    op.create_index("ix_marks_policy_mark_seq", "marks", ["policy", "mark", "seq"])
    op.create_table(
        "saved_views",
        sa.Column("view_id", sa.String(64), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("filters", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.PrimaryKeyConstraint("view_id", name="pk_saved_views"),
        sa.UniqueConstraint("policy", "name", name="uq_saved_views_policy_name"),
    )
