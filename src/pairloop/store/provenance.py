"""Lineage backwards: what built a dataset, and which runs, versions and groups stand around it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import cycles, dataset_pairs, datasets, jobs, pair_groups, runs, versions


class Maker(NamedTuple):
    """What built a dataset: a cycle, a fine-tuning job, or neither (by hand)."""

    cycle_id: str | None = None
    cycle_number: int | None = None
    job_id: str | None = None


def makers(c: Connection, dataset_ids: Collection[str]) -> dict[str, Maker]:
    """Of each dataset that is there; a page of them at a time."""
    statement = (
        sa.select(datasets.c.dataset_id, datasets.c.cycle_id, cycles.c.number, sa.func.min(jobs.c.job_id))
        .select_from(
            datasets.outerjoin(cycles, cycles.c.cycle_id == datasets.c.cycle_id).outerjoin(
                jobs, jobs.c.dataset_id == datasets.c.dataset_id
            )
        )
        .where(datasets.c.dataset_id.in_(list(dataset_ids)))
        .group_by(datasets.c.dataset_id, datasets.c.cycle_id, cycles.c.number)
    )
    return {row[0]: Maker(*row[1:]) for row in c.execute(statement)}


def trained_on(c: Connection, dataset_ids: Collection[str]) -> dict[str, list[str]]:
    """Names of the versions that were trained on each dataset, oldest first; checkpoints of jobs are left out."""
    statement = (
        sa.select(versions.c.dataset_id, versions.c.policy, versions.c.number)
        .where(versions.c.dataset_id.in_(list(dataset_ids)), versions.c.step_number.is_(None))
        .order_by(versions.c.policy, versions.c.number)
    )
    found: dict[str, list[str]] = {}
    for row in c.execute(statement):
        found.setdefault(row.dataset_id, []).append(f"{row.policy}@{row.number}")
    return found


def runs_on(c: Connection, policy: str, dataset_id: str) -> list[tuple[str, str]]:
    """(run_id, status) of the trainings of ``policy`` on a dataset, oldest first."""
    statement = sa.select(runs.c.run_id, runs.c.status).where(runs.c.policy == policy, runs.c.dataset_id == dataset_id)
    return [(row.run_id, row.status) for row in c.execute(statement.order_by(runs.c.created_at))]


def containing_group(c: Connection, group_id: str) -> list[str]:
    """Ids of the datasets that hold a row made from this group, oldest first."""
    holding = (
        sa.select(dataset_pairs.c.dataset_id)
        .join(pair_groups, pair_groups.c.pair_id == dataset_pairs.c.pair_id)
        .where(pair_groups.c.group_id == group_id)
    )
    statement = sa.select(datasets.c.dataset_id).where(datasets.c.dataset_id.in_(holding))
    return list(c.execute(statement.order_by(datasets.c.created_at, datasets.c.feedback_seq)).scalars())
