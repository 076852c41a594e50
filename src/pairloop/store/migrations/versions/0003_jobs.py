"""Files, fine-tuning jobs and their events; and which versions a job made.

Column types stand here as the database sees them, so that a later change of ours cannot change this step.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _files()
    _jobs()
    _events()
    op.add_column("versions", sa.Column("job_id", sa.String(64), nullable=True))
    op.add_column("versions", sa.Column("step_number", sa.Integer(), nullable=True))
    op.add_column("versions", sa.Column("model_name", sa.String(255), nullable=True))
    op.add_column("versions", sa.Column("metrics", sa.JSON(), nullable=True))
    op.add_column("versions", sa.Column("record", sa.JSON(), nullable=True))
    op.create_index("uq_versions_model_name", "versions", ["model_name"], unique=True)
    op.create_index("ix_versions_job_id", "versions", ["job_id"])


def _files() -> None:
    op.create_table(
        "files",
        sa.Column("file_id", sa.String(64), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("status_details", sa.Text(), nullable=True),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.Column("deleted_at", sa.String(27), nullable=True),
        sa.PrimaryKeyConstraint("file_id", name="pk_files"),
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=True),
        sa.Column("parent", sa.Integer(), nullable=False),
        sa.Column("training_file", sa.String(64), nullable=False),
        sa.Column("validation_file", sa.String(64), nullable=True),
        sa.Column("method", sa.JSON(), nullable=False),
        sa.Column("suffix", sa.String(64), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=True),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", sa.String(27), nullable=True),
        sa.Column("heartbeat_at", sa.String(27), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("dataset_id", sa.String(64), nullable=True),
        sa.Column("fine_tuned_model", sa.String(255), nullable=True),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column("result_files", sa.JSON(), nullable=False),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.Column("finished_at", sa.String(27), nullable=True),
        sa.ForeignKeyConstraint(["training_file"], ["files.file_id"], name="fk_jobs_training_file"),
        sa.ForeignKeyConstraint(["validation_file"], ["files.file_id"], name="fk_jobs_validation_file"),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.dataset_id"], name="fk_jobs_dataset_id"),
        sa.PrimaryKeyConstraint("job_id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_status_job_id", "jobs", ["status", "job_id"])
    op.create_index("ix_jobs_dataset_id", "jobs", ["dataset_id"])


def _events() -> None:
    op.create_table(
        "job_events",
        sa.Column("seq", _SEQUENCE, nullable=False),
        sa.Column("event_id", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("type", sa.String(16), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(27), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name="fk_job_events_job_id"),
        sa.PrimaryKeyConstraint("seq", name="pk_job_events"),
        sa.UniqueConstraint("event_id", name="uq_job_events_event_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_job_events_job_id_seq", "job_events", ["job_id", "seq"])
