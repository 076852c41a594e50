"""The first schema: groups, feedback, datasets and their lineage, cycles, duels, runs, versions.

Column types stand here as the database sees them, so that a later change of ours cannot change this step.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _loop()
    _evidence()
    _lineage()
    _versions()


def _loop() -> None:
    op.create_table(
        "cycles",
        sa.Column("cycle_id", sa.String(64), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("parent", sa.Integer(), nullable=False),
        sa.Column("trigger", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.PrimaryKeyConstraint("cycle_id", name="pk_cycles"),
        sa.UniqueConstraint("policy", "number", name="uq_cycles_policy_number"),
    )
    op.create_table(
        "cycle_steps",
        sa.Column("cycle_id", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("record", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["cycle_id"], ["cycles.cycle_id"], name="fk_cycle_steps_cycle_id"),
        sa.PrimaryKeyConstraint("cycle_id", "position", name="pk_cycle_steps"),
    )
    op.create_table(
        "datasets",
        sa.Column("dataset_id", sa.String(64), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("cycle_id", sa.String(64), nullable=True),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("n_train", sa.Integer(), nullable=False),
        sa.Column("n_heldout", sa.Integer(), nullable=False),
        sa.Column("counts", sa.JSON(), nullable=False),
        sa.Column("dropped", sa.JSON(), nullable=False),
        sa.Column("feedback_seq", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["cycle_id"], ["cycles.cycle_id"], name="fk_datasets_cycle_id"),
        sa.PrimaryKeyConstraint("dataset_id", name="pk_datasets"),
    )
    op.create_index("ix_datasets_policy_created_at", "datasets", ["policy", "created_at"])
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("cycle_id", sa.String(64), nullable=True),
        sa.Column("dataset_id", sa.String(64), nullable=False),
        sa.Column("parent", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", sa.String(27), nullable=False),
        sa.Column("heartbeat_at", sa.String(27), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["cycle_id"], ["cycles.cycle_id"], name="fk_runs_cycle_id"),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.dataset_id"], name="fk_runs_dataset_id"),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
    )
    op.create_index("ix_runs_cycle_id_attempt", "runs", ["cycle_id", "attempt"])
    op.create_index("ix_runs_policy_created_at", "runs", ["policy", "created_at"])
    op.create_table(
        "duels",
        sa.Column("duel_id", sa.String(64), nullable=False),
        sa.Column("cycle_id", sa.String(64), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("champion", sa.Integer(), nullable=False),
        sa.Column("challenger", sa.Integer(), nullable=False),
        sa.Column("opened_at", sa.String(27), nullable=False),
        sa.Column("closed_at", sa.String(27), nullable=True),
        sa.ForeignKeyConstraint(["cycle_id"], ["cycles.cycle_id"], name="fk_duels_cycle_id"),
        sa.PrimaryKeyConstraint("duel_id", name="pk_duels"),
    )
    op.create_index("ix_duels_policy_closed_at", "duels", ["policy", "closed_at"])
    op.create_index("ix_duels_policy_opened_at", "duels", ["policy", "opened_at"])
    op.create_table(
        "verdicts",
        sa.Column("seq", _SEQUENCE, nullable=False),
        sa.Column("cycle_id", sa.String(64), nullable=False),
        sa.Column("duel_id", sa.String(64), nullable=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("e_value", sa.Float(53), nullable=False),
        sa.Column("wins", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("ties", sa.Integer(), nullable=False),
        sa.Column("raters", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["cycle_id"], ["cycles.cycle_id"], name="fk_verdicts_cycle_id"),
        sa.ForeignKeyConstraint(["duel_id"], ["duels.duel_id"], name="fk_verdicts_duel_id"),
        sa.PrimaryKeyConstraint("seq", name="pk_verdicts"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_verdicts_cycle_id_seq", "verdicts", ["cycle_id", "seq"])
    op.create_table(
        "leases",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.String(27), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    op.create_table(
        "triggers",
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.PrimaryKeyConstraint("policy", name="pk_triggers"),
    )


def _evidence() -> None:
    op.create_table(
        "groups",
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("pool", sa.String(16), nullable=False),
        sa.Column("prompt", sa.JSON(), nullable=False),
        sa.Column("prompt_hash", sa.String(32), nullable=False),
        sa.Column("prompt_token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("sampling", sa.JSON(), nullable=False),
        sa.Column("user", sa.Text(), nullable=True),
        sa.Column("conversation_id", sa.Text(), nullable=True),
        sa.Column("parent_group_id", sa.String(255), nullable=True),
        sa.Column("parent_index", sa.Integer(), nullable=True),
        sa.Column("duel_id", sa.String(64), nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["duel_id"], ["duels.duel_id"], name="fk_groups_duel_id"),
        sa.PrimaryKeyConstraint("group_id", name="pk_groups"),
    )
    op.create_index("ix_groups_duel_id", "groups", ["duel_id"])
    op.create_index("ix_groups_policy_created_at", "groups", ["policy", "created_at"])
    op.create_index("ix_groups_policy_pool_created_at", "groups", ["policy", "pool", "created_at"])
    op.create_table(
        "completions",
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("logps", sa.LargeBinary(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("answer_key", sa.String(32), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name="fk_completions_group_id"),
        sa.PrimaryKeyConstraint("group_id", "position", name="pk_completions"),
    )
    op.create_index("ix_completions_answer_key_created_at", "completions", ["answer_key", "created_at"])
    op.create_table(
        "feedback",
        sa.Column("seq", _SEQUENCE, nullable=False),
        sa.Column("feedback_id", sa.String(255), nullable=False),
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("metric", sa.String(64), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("rater_id", sa.Text(), nullable=False),
        sa.Column("label", sa.String(16), nullable=True),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("value", sa.Text(), nullable=True),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("shown_order", sa.JSON(), nullable=False),
        sa.Column("latency_ms", sa.BigInteger(), nullable=True),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name="fk_feedback_group_id"),
        sa.PrimaryKeyConstraint("seq", name="pk_feedback"),
        sa.UniqueConstraint("feedback_id", name="uq_feedback_feedback_id"),
        sa.UniqueConstraint(
            "group_id",
            "rater_id",
            "metric",
            "choice_index",
            "revision",
            name="uq_feedback_group_id_rater_id_metric_choice_index_revision",
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_feedback_policy_seq", "feedback", ["policy", "seq"])


def _lineage() -> None:
    op.create_table(
        "dataset_pairs",
        sa.Column("dataset_id", sa.String(64), nullable=False),
        sa.Column("pair_id", sa.String(255), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.dataset_id"], name="fk_dataset_pairs_dataset_id"),
        sa.PrimaryKeyConstraint("dataset_id", "pair_id", name="pk_dataset_pairs"),
    )
    op.create_index("ix_dataset_pairs_pair_id", "dataset_pairs", ["pair_id"])
    op.create_table(
        "pair_groups",
        sa.Column("pair_id", sa.String(255), nullable=False),
        sa.Column("group_id", sa.String(255), nullable=False),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name="fk_pair_groups_group_id"),
        sa.PrimaryKeyConstraint("pair_id", "group_id", name="pk_pair_groups"),
    )
    op.create_index("ix_pair_groups_group_id", "pair_groups", ["group_id"])
    op.create_table(
        "pair_feedback",
        sa.Column("pair_id", sa.String(255), nullable=False),
        sa.Column("feedback_id", sa.String(255), nullable=False),
        sa.ForeignKeyConstraint(["feedback_id"], ["feedback.feedback_id"], name="fk_pair_feedback_feedback_id"),
        sa.PrimaryKeyConstraint("pair_id", "feedback_id", name="pk_pair_feedback"),
    )
    op.create_index("ix_pair_feedback_feedback_id", "pair_feedback", ["feedback_id"])


def _versions() -> None:
    op.create_table(
        "versions",
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("artifact_hash", sa.String(128), nullable=False),
        sa.Column("parent", sa.Integer(), nullable=True),
        sa.Column("dataset_id", sa.String(64), nullable=True),
        sa.Column("run_id", sa.String(64), nullable=True),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.dataset_id"], name="fk_versions_dataset_id"),
        sa.ForeignKeyConstraint(["policy", "parent"], ["versions.policy", "versions.number"], name="fk_versions_policy_parent"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_versions_run_id"),
        sa.PrimaryKeyConstraint("policy", "number", name="pk_versions"),
    )
    op.create_table(
        "aliases",
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("alias", sa.String(16), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["policy", "number"], ["versions.policy", "versions.number"], name="fk_aliases_policy_number"),
        sa.PrimaryKeyConstraint("policy", "alias", name="pk_aliases"),
    )
    op.create_table(
        "promotions",
        sa.Column("seq", _SEQUENCE, nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("previous", sa.Integer(), nullable=True),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("cycle_id", sa.String(64), nullable=True),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["cycle_id"], ["cycles.cycle_id"], name="fk_promotions_cycle_id"),
        sa.ForeignKeyConstraint(
            ["policy", "number"], ["versions.policy", "versions.number"], name="fk_promotions_policy_number"
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_promotions"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_promotions_policy_seq", "promotions", ["policy", "seq"])
