"""Which webhook is told of which event: one row each, from planned to delivered or given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.store.events import Event, event_of, newest_seq
from pairloop.store.schema import events, webhook_cursors, webhook_deliveries

LOOK_BACK = 1_000
"""Events looked at again in each plan: on PostgreSQL one may become visible after a later one did."""
_JOBS = "fine_tuning.job.%"


class DeliveryStatus(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event and where telling an endpoint of it stands; ``next_at``: when it is tried next."""

    endpoint: str
    event: Event
    status: DeliveryStatus
    attempts: int
    next_at: datetime
    error: str | None
    created_at: datetime


def begin(c: Connection, policy: str, endpoint: str) -> None:
    """An endpoint that is new is told of what happens from now on."""
    known = sa.select(webhook_cursors.c.endpoint).where(*_cursor(policy, endpoint))
    if c.execute(known).first() is None:
        seq = newest_seq(c)
        c.execute(sa.insert(webhook_cursors), {"policy": policy, "endpoint": endpoint, "begin_seq": seq, "seen_seq": seq})


def plan(c: Connection, policy: str, endpoint: str, kinds: Sequence[str], at: datetime) -> int:
    """A pending row for each event that the endpoint has to be told of; how many are new. Empty ``kinds``: all of them.

    Jobs are everybody's who works on this database, for their lineages have names of their own.
    """
    cursor = c.execute(sa.select(webhook_cursors).where(*_cursor(policy, endpoint))).one()
    told = sa.exists().where(webhook_deliveries.c.event_id == events.c.event_id, *_of(policy, endpoint))
    wanted = sa.select(events.c.seq, events.c.event_id).where(
        events.c.seq > max(cursor.begin_seq, cursor.seen_seq - LOOK_BACK),
        sa.or_(events.c.policy == policy, events.c.type.like(_JOBS)),
        events.c.type != "webhook.test",
        ~told,
    )
    if kinds:
        wanted = wanted.where(events.c.type.in_(kinds))
    found = c.execute(wanted.order_by(events.c.seq)).all()
    for row in found:
        _insert(c, policy, endpoint, row.event_id, at)
    newest = newest_seq(c)
    if newest != cursor.seen_seq:
        c.execute(sa.update(webhook_cursors).where(*_cursor(policy, endpoint)).values(seen_seq=newest))
    return len(found)


def single(c: Connection, policy: str, endpoint: str, event_id: str, at: datetime) -> None:
    """A row for one event, whatever the endpoint's filter says."""
    _insert(c, policy, endpoint, event_id, at)


def anything_new(c: Connection, policy: str, endpoints: Sequence[str], now: datetime) -> bool:
    """Whether an event has not been planned for, or a delivery is due."""
    mine = (webhook_cursors.c.policy == policy, webhook_cursors.c.endpoint.in_(endpoints))
    seen = c.execute(sa.select(sa.func.min(webhook_cursors.c.seen_seq)).where(*mine)).scalar()
    if seen is not None and seen < newest_seq(c):
        return True
    return c.execute(_due(policy, endpoints, now).limit(1)).first() is not None


def due(c: Connection, policy: str, endpoint: str, now: datetime, limit: int) -> list[Delivery]:
    """Pending and to be tried now, oldest first."""
    statement = _due(policy, [endpoint], now).order_by(events.c.seq).limit(limit)
    return [_delivery(row) for row in c.execute(statement)]


def settle(
    c: Connection,
    policy: str,
    delivery: Delivery,
    status: DeliveryStatus,
    *,
    error: str | None,
    next_at: datetime,
    at: datetime,
) -> None:
    """Record an attempt, and when the next one is."""
    statement = sa.update(webhook_deliveries).where(
        webhook_deliveries.c.event_id == delivery.event.event_id, *_of(policy, delivery.endpoint)
    )
    values = {"status": status.value, "attempts": delivery.attempts + 1, "error": error, "next_at": next_at, "updated_at": at}
    c.execute(statement.values(**values))


def again(c: Connection, policy: str, at: datetime, *, endpoint: str | None = None, event_id: str | None = None) -> int:
    """Make deliveries pending again: those that failed, or of one event, whatever became of them. How many."""
    statement = sa.update(webhook_deliveries).where(webhook_deliveries.c.policy == policy)
    if endpoint is not None:
        statement = statement.where(webhook_deliveries.c.endpoint == endpoint)
    if event_id is not None:
        statement = statement.where(webhook_deliveries.c.event_id == event_id)
    else:
        statement = statement.where(webhook_deliveries.c.status == DeliveryStatus.FAILED.value)
    values = {"status": DeliveryStatus.PENDING.value, "attempts": 0, "next_at": at, "created_at": at, "updated_at": at}
    return c.execute(statement.values(**values)).rowcount


def give_up_others(c: Connection, policy: str, endpoints: Sequence[str], at: datetime) -> int:
    """Deliveries that wait for an endpoint that is none of these fail: it left the configuration. How many."""
    waiting = (webhook_deliveries.c.policy == policy, webhook_deliveries.c.status == DeliveryStatus.PENDING.value)
    statement = sa.update(webhook_deliveries).where(*waiting, webhook_deliveries.c.endpoint.not_in(endpoints))
    values = {"status": DeliveryStatus.FAILED.value, "error": "the endpoint left the configuration", "updated_at": at}
    return c.execute(statement.values(**values)).rowcount


def list_(c: Connection, policy: str, *, status: DeliveryStatus | None = None, limit: int = 50) -> list[Delivery]:
    """Newest event first."""
    statement = _joined().where(webhook_deliveries.c.policy == policy)
    if status is not None:
        statement = statement.where(webhook_deliveries.c.status == status.value)
    return [_delivery(row) for row in c.execute(statement.order_by(events.c.seq.desc()).limit(limit))]


def _insert(c: Connection, policy: str, endpoint: str, event_id: str, at: datetime) -> None:
    row = {"policy": policy, "endpoint": endpoint, "event_id": event_id, "status": DeliveryStatus.PENDING.value}
    times = {"next_at": at, "created_at": at, "updated_at": at}
    c.execute(sa.insert(webhook_deliveries), {**row, "attempts": 0, "error": None, **times})


def _joined() -> sa.Select[Any]:
    own = (webhook_deliveries.c[name] for name in ("endpoint", "status", "attempts", "next_at", "error"))
    planned_at = webhook_deliveries.c.created_at.label("planned_at")
    return sa.select(events, *own, planned_at).select_from(webhook_deliveries.join(events))


def _due(policy: str, endpoints: Sequence[str], now: datetime) -> sa.Select[Any]:
    return _joined().where(
        webhook_deliveries.c.policy == policy,
        webhook_deliveries.c.endpoint.in_(endpoints),
        webhook_deliveries.c.status == DeliveryStatus.PENDING.value,
        webhook_deliveries.c.next_at <= now,
    )


def _cursor(policy: str, endpoint: str) -> tuple[sa.ColumnElement[bool], ...]:
    return webhook_cursors.c.policy == policy, webhook_cursors.c.endpoint == endpoint


def _of(policy: str, endpoint: str) -> tuple[sa.ColumnElement[bool], ...]:
    return webhook_deliveries.c.policy == policy, webhook_deliveries.c.endpoint == endpoint


def _delivery(row: Row[Any]) -> Delivery:
    return Delivery(
        endpoint=row.endpoint,
        event=event_of(row),
        status=DeliveryStatus(row.status),
        attempts=row.attempts,
        next_at=row.next_at,
        error=row.error,
        created_at=row.planned_at,
    )
