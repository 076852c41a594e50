"""Totals and ages for those who watch a running system: each one query that a scrape can afford."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.jobs import JobStatus
from pairloop.store.schema import (
    completions,
    cycle_steps,
    cycles,
    datasets,
    feedback,
    groups,
    jobs,
    keys,
    leases,
    promotions,
    runs,
    verdicts,
    webhook_deliveries,
)
from pairloop.types import PREFERENCE_METRIC, CycleState, GroupKind, RunStatus

_ENDS = tuple(state.value for state in CycleState if state.is_terminal)
_KINDS = (GroupKind.TRAIN.value, GroupKind.HELDOUT.value)
COUNTED_AT_MOST = 10_000


class HeldLease(NamedTuple):
    """A lease that somebody holds, run out or not."""

    name: str
    owner: str
    expires_at: datetime


class Told(NamedTuple):
    """Deliveries of one endpoint in one state."""

    endpoint: str
    status: str
    number: int
    oldest_at: datetime


def cycles_by_end(c: Connection, policy: str) -> dict[str, int]:
    """Cycles that ended, by state."""
    statement = sa.select(cycle_steps.c.state, sa.func.count()).select_from(cycle_steps.join(cycles))
    statement = statement.where(cycles.c.policy == policy, cycle_steps.c.state.in_(_ENDS)).group_by(cycle_steps.c.state)
    return _counted(c, statement)


def verdicts_by_kind(c: Connection, policy: str) -> dict[str, int]:
    statement = sa.select(verdicts.c.kind, sa.func.count()).select_from(verdicts.join(cycles))
    return _counted(c, statement.where(cycles.c.policy == policy).group_by(verdicts.c.kind))


def promotions_by_action(c: Connection, policy: str) -> dict[str, int]:
    statement = sa.select(promotions.c.action, sa.func.count()).where(promotions.c.policy == policy)
    return _counted(c, statement.group_by(promotions.c.action))


def runs_by_status(c: Connection, policy: str) -> dict[str, int]:
    statement = sa.select(runs.c.status, sa.func.count()).where(runs.c.policy == policy)
    return _counted(c, statement.group_by(runs.c.status))


def jobs_by_status(c: Connection) -> dict[str, int]:
    return _counted(c, sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status))


def picks_since(c: Connection, policy: str, since: datetime) -> int:
    """Picks given since then, each counted once however often it was revised. Reads all feedback rows of the policy."""
    this = (feedback.c.policy == policy, feedback.c.metric == PREFERENCE_METRIC, feedback.c.revision == 0)
    return c.execute(sa.select(sa.func.count()).where(*this, feedback.c.created_at >= since)).scalar_one()


def requests_between(c: Connection, policy: str, since: datetime, until: datetime) -> int:
    """Groups that were recorded in this time; what was sampled in the shadow counts too."""
    at = groups.c.created_at
    return c.execute(sa.select(sa.func.count()).where(groups.c.policy == policy, at >= since, at < until)).scalar_one()


def requests_of_duels(c: Connection, duel_ids: Collection[str]) -> dict[str, int]:
    """Requests that were answered by both sides of each duel, picked from or not."""
    statement = sa.select(groups.c.duel_id, sa.func.count()).where(groups.c.duel_id.in_(duel_ids))
    return _counted(c, statement.group_by(groups.c.duel_id))


def oldest_run_beat(c: Connection, policy: str) -> datetime | None:
    """When the running run that has been silent longest last said that its owner is alive."""
    mine = (runs.c.policy == policy, runs.c.status == RunStatus.RUNNING.value)
    return _minimum(c, sa.select(runs.c.heartbeat_at).where(*mine).order_by(runs.c.heartbeat_at))


def oldest_job_beat(c: Connection) -> datetime | None:
    """The same of jobs that a worker has."""
    moving = (JobStatus.RUNNING.value, JobStatus.VALIDATING.value)
    held = (jobs.c.status.in_(moving), jobs.c.owner.is_not(None), jobs.c.heartbeat_at.is_not(None))
    return _minimum(c, sa.select(jobs.c.heartbeat_at).where(*held).order_by(jobs.c.heartbeat_at))


def held_leases(c: Connection) -> list[HeldLease]:
    statement = sa.select(leases.c.name, leases.c.owner, leases.c.expires_at).where(leases.c.owner.is_not(None))
    return [HeldLease(*row) for row in c.execute(statement.order_by(leases.c.name))]


def soonest_key_expiry(c: Connection, now: datetime) -> datetime | None:
    """When the next key stops to be good that still is."""
    good = (keys.c.revoked_at.is_(None), keys.c.expires_at > now)
    return _minimum(c, sa.select(keys.c.expires_at).where(*good).order_by(keys.c.expires_at))


def dropped(c: Connection, policy: str) -> dict[str, int]:
    """What the newest snapshot left out, by reason."""
    statement = sa.select(datasets.c.dropped).where(datasets.c.policy == policy)
    found: dict[str, int] | None = c.execute(statement.order_by(datasets.c.created_at.desc()).limit(1)).scalar()
    return found or {}


def deliveries(c: Connection, policy: str) -> list[Told]:
    """Webhook deliveries by endpoint and state, with when the oldest of them was planned."""
    by = (webhook_deliveries.c.endpoint, webhook_deliveries.c.status)
    figures = (sa.func.count(), sa.func.min(webhook_deliveries.c.created_at))
    statement = sa.select(*by, *figures).where(webhook_deliveries.c.policy == policy).group_by(*by)
    return [Told(*row) for row in c.execute(statement)]


def unlabelled(c: Connection, policy: str, before: datetime) -> int:
    """Comparisons older than ``before`` without any feedback, as the labeller would find them; ``COUNTED_AT_MOST`` at most."""
    second = sa.exists().where(completions.c.group_id == groups.c.group_id, completions.c.position == 1)
    judged = sa.exists().where(feedback.c.group_id == groups.c.group_id)
    waiting = (
        sa.select(groups.c.group_id)
        .where(groups.c.policy == policy, groups.c.created_at < before, groups.c.kind.in_(_KINDS), second, ~judged)
        .limit(COUNTED_AT_MOST)
    )
    return c.execute(sa.select(sa.func.count()).select_from(waiting.subquery())).scalar_one()


def _counted(c: Connection, statement: sa.Select[Any]) -> dict[str, int]:
    return {str(name): int(count) for name, count in c.execute(statement)}


def _minimum(c: Connection, statement: sa.Select[Any]) -> datetime | None:
    found: datetime | None = c.execute(statement.limit(1)).scalar()
    return found
