"""Folders that are to go: datasets and weights that are marked as removed, and what runs keep of such datasets."""

from __future__ import annotations

import logging
import shutil
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import StoreError
from pairloop.loop import train
from pairloop.store import Store, removed, runs
from pairloop.store.schema import datasets, jobs, removed_artifacts
from pairloop.store.schema import runs as run_table
from pairloop.types import Run, RunStatus

LOG = logging.getLogger(__name__)


def clear(store: Store, config: Config) -> None:
    """Delete them, on whichever machine asks: runs lie on the one that trained. Nothing is left of a call that was killed."""
    with store.reading() as c:
        trained, tuned = _runs_on_removed(c), _jobs_on_removed(c)
    for run in trained:
        _clear_run(config, run)
    for job_id in tuned:
        shutil.rmtree(config.runs_dir / job_id, ignore_errors=True)
    try:
        shared = store.artifacts.sharing_runs() if trained or tuned else {}
    except StoreError as error:  # texts that are due go from the database all the same; the next call looks again
        LOG.warning("shared checkpoints of removed datasets could not be looked for: %s", error)
        shared = {}
    for name in {*map(runs.folder_name, trained), *tuned}.intersection(shared):
        train.forget(store.artifacts, name)
    removed.sweep(store)


def _runs_on_removed(c: Connection) -> list[Run]:
    ids = c.execute(
        sa.select(run_table.c.run_id)
        .join(datasets, datasets.c.dataset_id == run_table.c.dataset_id)
        .join(removed_artifacts, removed_artifacts.c.path == datasets.c.path)
    ).scalars()
    found = [run for run_id in ids.all() if (run := runs.get(c, run_id)) is not None]
    return [run for run in found if run.status is not RunStatus.RUNNING or run.lease_expires_at < datetime.now(UTC)]


def _jobs_on_removed(c: Connection) -> list[str]:
    """Fine-tuning jobs that no worker has."""
    idle = sa.or_(jobs.c.owner.is_(None), jobs.c.lease_expires_at < datetime.now(UTC))
    return list(
        c.execute(
            sa.select(jobs.c.job_id)
            .join(datasets, datasets.c.dataset_id == jobs.c.dataset_id)
            .join(removed_artifacts, removed_artifacts.c.path == datasets.c.path)
            .where(idle)
        ).scalars()
    )


def _clear_run(config: Config, run: Run) -> None:
    """Checkpoints hold the optimiser's memory of the rows, and a log may quote one; the figures stay."""
    folder = train.folder_of(config, run)
    for name in ("checkpoints", "out", "epochs", "data"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "child.log").unlink(missing_ok=True)
