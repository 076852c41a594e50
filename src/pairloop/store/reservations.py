"""Reservations: which comparison of the labelling queue is whose, until when. Rows go a day after they end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.store.schema import reservations

KEPT = timedelta(days=1)


class ItemKind(StrEnum):
    """Why the queue shows a comparison: it wants a pick, its answer is known, or this rater picked from it before."""

    NEW = "new"
    GOLD = "gold"
    REPEAT = "repeat"


@dataclass(frozen=True, slots=True)
class Reservation:
    """A comparison that is ``rater_id``'s until ``expires_at``; the answer ``first_index`` stands in the first place."""

    reservation_id: str
    policy: str
    group_id: str
    rater_id: str
    kind: ItemKind
    first_index: int
    created_at: datetime
    expires_at: datetime
    done_at: datetime | None = None

    @property
    def shown_order(self) -> tuple[int, int]:
        return (self.first_index, 1 - self.first_index)


def insert(c: Connection, reservation: Reservation) -> None:
    c.execute(sa.insert(reservations), {**asdict(reservation), "kind": reservation.kind.value})


def get(c: Connection, reservation_id: str) -> Reservation | None:
    row = c.execute(sa.select(reservations).where(reservations.c.reservation_id == reservation_id)).first()
    return None if row is None else _reservation(row)


def held(c: Connection, policy: str, rater_id: str, now: datetime) -> Reservation | None:
    """What the rater is shown right now."""
    statement = sa.select(reservations).where(
        reservations.c.policy == policy,
        reservations.c.rater_id == rater_id,
        reservations.c.done_at.is_(None),
        reservations.c.expires_at > now,
    )
    row = c.execute(statement.order_by(reservations.c.created_at.desc()).limit(1)).first()
    return None if row is None else _reservation(row)


def finish(c: Connection, reservation_id: str, at: datetime) -> None:
    """The rater has answered; an answer that is revised later ends nothing anew."""
    this = reservations.c.reservation_id == reservation_id
    c.execute(sa.update(reservations).where(this, reservations.c.done_at.is_(None)).values(done_at=at))


def give_back(c: Connection, reservation_id: str, *, rater_id: str | None = None) -> bool:
    """The comparison goes back to the queue; False where there was nothing to give back, or not by this rater."""
    statement = sa.delete(reservations).where(reservations.c.reservation_id == reservation_id, reservations.c.done_at.is_(None))
    if rater_id is not None:
        statement = statement.where(reservations.c.rater_id == rater_id)
    return bool(c.execute(statement).rowcount)


def sweep(c: Connection, now: datetime) -> None:
    """Delete those that ended more than a day ago."""
    c.execute(sa.delete(reservations).where(reservations.c.expires_at < now - KEPT))


def _reservation(row: Row[Any]) -> Reservation:
    return Reservation(**{**row._mapping, "kind": ItemKind(row.kind)})
