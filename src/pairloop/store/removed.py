"""Artifact folders that were removed on purpose: which, why, and what is left of a dataset's rows."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store import artifacts
from pairloop.store.schema import removed_artifacts
from pairloop.store.store import Store


class Why(StrEnum):
    ERASURE = "erasure"
    RETENTION = "retention"


def mark(c: Connection, path: str, why: Why, at: datetime, *, successor: str | None = None) -> None:
    """Record that the folder is no longer needed; the folder itself goes by `sweep`, after the commit."""
    row = {"path": artifacts.to_row(c, path), "reason": why.value, "successor": successor, "created_at": at}
    if not is_removed(c, path):
        c.execute(sa.insert(removed_artifacts), row)


def is_removed(c: Connection, path: str) -> bool:
    """Whether an artifact's folder was removed on purpose."""
    return c.execute(_OF_PATH.where(removed_artifacts.c.path == artifacts.to_row(c, path))).first() is not None


def sweep(store: Store) -> int:
    """Delete the folders of those that are marked and not cleared yet, as after a crash. How many there were.

    What goes by its age leaves its manifest: it holds no text, and weights can be made again from it.
    """
    with store.reading() as c:
        left = sa.select(removed_artifacts).where(removed_artifacts.c.cleared_at.is_(None))
        marked = [(row.path, artifacts.from_row(c, row.path), row.reason) for row in c.execute(left)]
    found = 0
    for name, path, why in marked:
        found += store.artifacts.clear(path, with_manifest=why != Why.RETENTION)
        this = sa.update(removed_artifacts).where(removed_artifacts.c.path == name)
        store.write(lambda c, this=this: c.execute(this.values(cleared_at=datetime.now(UTC))))  # type: ignore[misc]
    return found


_OF_PATH = sa.select(removed_artifacts.c.path)
