"""How long each answer took, and what versions said to the prompts that they were evaluated on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("completions", sa.Column("first_token_ms", sa.Integer(), nullable=True))
    op.add_column("completions", sa.Column("total_ms", sa.Integer(), nullable=True))
    op.create_table(
        "samples",
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("position", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.Column("against", sa.Integer(), nullable=False),
        sa.Column("ours", sa.Text(), nullable=False),
        sa.Column("theirs", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name="fk_samples_group_id"),
        sa.ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"], name="fk_samples_policy_number"),
        sa.PrimaryKeyConstraint("policy", "number", "position", name="pk_samples"),
    )
    op.create_index("ix_samples_group_id", "samples", ["group_id"])
