"""Stored completions: what the wire lists, its metadata, what was deleted; and conversations by index.

Earlier answers are listed too."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_CHUNK = 1_000


def upgrade() -> None:
    op.create_table(
        "stored_completions",
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("is_listed", sa.Boolean(), nullable=False),
        sa.Column("deleted_at", sa.String(27), nullable=True),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name="fk_stored_completions_group_id"),
        sa.PrimaryKeyConstraint("group_id", name="pk_stored_completions"),
    )
    op.create_table(
        "stored_metadata",
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name="fk_stored_metadata_group_id"),
        sa.PrimaryKeyConstraint("group_id", "key", name="pk_stored_metadata"),
    )
    op.create_index("ix_groups_conversation_id", "groups", ["conversation_id"])
    _list_what_was_answered(op.get_bind())
    op.create_index(
        "ix_stored_completions_policy_is_listed_group_id", "stored_completions", ["policy", "is_listed", "group_id"]
    )
    op.create_index(
        "ix_stored_completions_policy_model_is_listed_group_id",
        "stored_completions",
        ["policy", "model", "is_listed", "group_id"],
    )
    op.create_index("ix_stored_metadata_policy_key_value_group_id", "stored_metadata", ["policy", "key", "value", "group_id"])


def _list_what_was_answered(c: sa.Connection) -> None:
    """A row for each whole group that was served, as if it had been answered today."""
    listed = sa.table(
        "stored_completions",
        *(sa.column(name) for name in ("group_id", "policy", "model")),
        sa.column("metadata", sa.JSON()),
        sa.column("is_listed", sa.Boolean()),
    )
    pairs = sa.table("stored_metadata", *(sa.column(name) for name in ("group_id", "key", "policy", "value")))
    answered = sa.text(
        "SELECT g.group_id, g.policy, g.kind, g.metadata, a.version FROM groups g JOIN completions a"
        " ON a.group_id = g.group_id AND a.position = 0"
        " WHERE g.group_id > :after AND g.kind <> 'imported' AND a.finish_reason <> 'abandoned'"
        f" ORDER BY g.group_id LIMIT {_CHUNK}"
    )
    after = ""
    while rows := c.execute(answered, {"after": after}).all():
        after = rows[-1].group_id
        made = [(row, _metadata(row.metadata)) for row in rows]
        c.execute(
            sa.insert(listed),
            [
                {
                    "group_id": row.group_id,
                    "policy": row.policy,
                    "model": row.policy if row.kind == "duel" or row.version is None else f"{row.policy}@{row.version}",
                    "metadata": metadata,
                    "is_listed": True,
                }
                for row, metadata in made
            ],
        )
        found = [
            {"group_id": row.group_id, "key": key, "policy": row.policy, "value": value}
            for row, metadata in made
            for key, value in metadata.items()
        ]
        if found:
            c.execute(sa.insert(pairs), found)


def _metadata(stored: Any) -> dict[str, str]:
    """SQLite hands out JSON as text, Postgres as what it says."""
    found: dict[str, str] = json.loads(stored) if isinstance(stored, str) else stored
    return found
