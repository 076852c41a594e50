"""Of each version's live answers, those that nobody was shown."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("traffic", sa.Column("unseen", sa.Integer(), nullable=True))
