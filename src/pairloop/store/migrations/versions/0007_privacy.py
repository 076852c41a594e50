"""Privacy: what was redacted, who was erased (hashed), which versions had seen them, which artifacts were removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("completions", sa.Column("is_redacted", sa.Boolean(), nullable=True))
    op.create_table(
        "erasures",
        sa.Column("erasure_id", sa.String(64), nullable=False),
        sa.Column("salt", sa.String(32), nullable=False),
        sa.Column("subject_hash", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("counts", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.PrimaryKeyConstraint("erasure_id", name="pk_erasures"),
    )
    op.create_table(
        "version_marks",
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("erasure_id", sa.String(64), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("policy", "number", "erasure_id", name="pk_version_marks"),
        sa.ForeignKeyConstraint(["erasure_id"], ["erasures.erasure_id"], name="fk_version_marks_erasure_id"),
        sa.ForeignKeyConstraint(
            ["policy", "number"], ["versions.policy", "versions.number"], name="fk_version_marks_policy_number"
        ),
    )
    op.create_table(
        "removed_artifacts",
        sa.Column("path", sa.String(255), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("successor", sa.String(64), nullable=True),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.Column("cleared_at", sa.String(27), nullable=True),
        sa.PrimaryKeyConstraint("path", name="pk_removed_artifacts"),
        sa.ForeignKeyConstraint(["successor"], ["datasets.dataset_id"], name="fk_removed_artifacts_successor"),
    )
