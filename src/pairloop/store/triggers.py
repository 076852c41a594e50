"""The pending trigger of each policy: what fired while a cycle was running."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import triggers


def put(c: Connection, policy: str, reason: str, at: datetime, *, is_asked: bool = True) -> None:
    """Keep one pending trigger; a later one replaces it. ``is_asked``: by somebody, not by the clock or new pairs."""
    values = {"reason": reason, "created_at": at, "is_asked": is_asked}
    if c.execute(sa.update(triggers).where(triggers.c.policy == policy).values(**values)).rowcount == 0:
        c.execute(sa.insert(triggers), {"policy": policy, **values})


def take(c: Connection, policy: str) -> str | None:
    """The pending trigger's reason, taken away."""
    reason = peek(c, policy)
    c.execute(sa.delete(triggers).where(triggers.c.policy == policy))
    return reason


def drop_unasked(c: Connection, policy: str) -> None:
    """Take away what the clock or new pairs put there: under another schedule it may not be due."""
    c.execute(sa.delete(triggers).where(triggers.c.policy == policy, triggers.c.is_asked.is_(False)))


def peek(c: Connection, policy: str) -> str | None:
    """The pending trigger's reason, left where it is."""
    return c.execute(sa.select(triggers.c.reason).where(triggers.c.policy == policy)).scalar()
