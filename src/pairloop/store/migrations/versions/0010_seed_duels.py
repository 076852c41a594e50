"""A duel against the base beside the one against the champion; every earlier duel was one against the champion."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("duels", sa.Column("kind", sa.String(8), nullable=False, server_default="gate"))
