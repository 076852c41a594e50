"""Canaries: versions that answer a share of the users before they may answer all; one row each, closed once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import ConflictError
from pairloop.store.schema import canaries

Outcome = Literal["promoted", "withdrawn"]

_CURRENT = (
    sa.select(canaries)
    .where(canaries.c.policy == sa.bindparam("policy"), canaries.c.closed_at.is_(None))
    .order_by(canaries.c.opened_at.desc())
    .limit(1)
)


@dataclass(frozen=True, slots=True)
class Canary:
    """Version ``version`` answers the users whose hash with ``salt`` falls below ``share``, in place of ``champion``."""

    canary_id: str
    policy: str
    version: int
    champion: int
    share: float
    salt: str
    cycle_id: str | None
    reason: str
    opened_at: datetime
    closed_at: datetime | None = None
    outcome: Outcome | None = None
    outcome_reason: str | None = None


def open(c: Connection, canary: Canary) -> None:
    """Write a canary; ConflictError while the policy has another open one."""
    other = current(c, canary.policy)
    if other is not None:
        raise ConflictError(f"{other.policy}@{other.version} is a canary already ({other.canary_id}); one at a time")
    c.execute(
        sa.insert(canaries),
        {
            "canary_id": canary.canary_id,
            "policy": canary.policy,
            "version": canary.version,
            "champion": canary.champion,
            "share": canary.share,
            "salt": canary.salt,
            "cycle_id": canary.cycle_id,
            "reason": canary.reason,
            "opened_at": canary.opened_at,
        },
    )


def close(c: Connection, canary_id: str, outcome: Outcome, reason: str, at: datetime) -> None:
    """Close an open canary; a closed one stays as it is."""
    this = (canaries.c.canary_id == canary_id, canaries.c.closed_at.is_(None))
    c.execute(sa.update(canaries).where(*this).values(closed_at=at, outcome=outcome, outcome_reason=reason))


def current(c: Connection, policy: str) -> Canary | None:
    """The open canary of a policy."""
    row = c.execute(_CURRENT, {"policy": policy}).first()
    return None if row is None else _canary(row)


def get(c: Connection, canary_id: str) -> Canary | None:
    row = c.execute(sa.select(canaries).where(canaries.c.canary_id == canary_id)).first()
    return None if row is None else _canary(row)


def of_version(c: Connection, policy: str, version: int) -> list[Canary]:
    """Oldest first; a version may have been a canary more than once."""
    statement = sa.select(canaries).where(canaries.c.policy == policy, canaries.c.version == version)
    return [_canary(row) for row in c.execute(statement.order_by(canaries.c.opened_at))]


def _canary(row: Row[Any]) -> Canary:
    return Canary(**row._mapping)
