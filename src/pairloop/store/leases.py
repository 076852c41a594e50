"""Leases: at most one owner of a name at a time, with a token that tells an old owner's writes from the new one's."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import leases


def acquire(c: Connection, name: str, owner: str, *, now: datetime, ttl_s: float) -> int | None:
    """Take or renew a lease for ``ttl_s`` seconds; its fencing token, or None while another owner holds it.

    The token stays while the owner renews, and rises with every change of owner.
    """
    expires_at = now + timedelta(seconds=ttl_s)
    held = c.execute(sa.select(leases).where(leases.c.name == name)).first()
    if held is None:
        c.execute(sa.insert(leases), {"name": name, "owner": owner, "token": 1, "expires_at": expires_at})
        return 1
    if held.owner not in (None, owner) and held.expires_at > now:
        return None
    token: int = held.token if held.owner == owner else held.token + 1
    c.execute(sa.update(leases).where(leases.c.name == name).values(owner=owner, token=token, expires_at=expires_at))
    return token


def release(c: Connection, name: str, owner: str) -> None:
    """Give the lease back; does nothing where another owner holds it. The row stays, so that tokens are never reused."""
    c.execute(sa.update(leases).where(leases.c.name == name, leases.c.owner == owner).values(owner=None))


def holder(c: Connection, name: str) -> str | None:
    """Who holds the lease, run out or not; None where nobody does."""
    owner: str | None = c.execute(sa.select(leases.c.owner).where(leases.c.name == name)).scalar()
    return owner
