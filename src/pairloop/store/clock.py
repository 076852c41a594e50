"""The one clock by which all processes on a database judge leases."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy import Connection


def shared_now(c: Connection) -> datetime:
    """Now by the database server's clock, so that the workers' own need not agree; with SQLite by their machine's."""
    if c.dialect.name == "sqlite":
        return datetime.now(UTC)
    now: datetime = c.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return now
