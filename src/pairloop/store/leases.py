"""Leases: at most one owner of a name at a time, with a token that tells an old owner's writes from the new one's."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import leases


def acquire(c: Connection, name: str, owner: str, *, now: datetime, ttl_s: float) -> int | None:
    """Take or renew a lease for ``ttl_s`` seconds; its fencing token, or None while another owner holds it.

    The token stays while the owner renews, and rises with every change of owner. The row is locked up to the caller's commit,
    so nobody takes the lease between a check and what is written under it.

    ``now`` may jump. Forward, a living owner may lose its lease: the token tells it so before its next write. Backward, a dead
    owner's lease would last for the size of the jump: one that ends later than a new one would is shortened to that.
    """
    expires_at = now + timedelta(seconds=ttl_s)
    this = leases.c.name == name
    held = c.execute(sa.select(leases).where(this).with_for_update()).first()
    if held is None:
        c.execute(sa.insert(leases), {"name": name, "owner": owner, "token": 1, "expires_at": expires_at})
        return 1
    if held.owner not in (None, owner) and held.expires_at > now:
        if held.expires_at > expires_at:
            c.execute(sa.update(leases).where(this).values(expires_at=expires_at))
        return None
    token: int = held.token if held.owner == owner else held.token + 1
    c.execute(sa.update(leases).where(this).values(owner=owner, token=token, expires_at=expires_at))
    return token


def release(c: Connection, name: str, owner: str) -> None:
    """Give the lease back; does nothing where another owner holds it. The row stays, so that tokens are never reused."""
    c.execute(sa.update(leases).where(leases.c.name == name, leases.c.owner == owner).values(owner=None))


def holder(c: Connection, name: str) -> str | None:
    """Who holds the lease, run out or not; None where nobody does."""
    owner: str | None = c.execute(sa.select(leases.c.owner).where(leases.c.name == name)).scalar()
    return owner
