"""Where evidence and artifacts live: ``Store`` (database and artifact folder) and one query module per noun.

Query functions take a SQLAlchemy connection and speak the types of ``pairloop.types``::

    with store.reading() as c:
        group = groups.get(c, group_id)
    row, duplicate = store.write(lambda c: feedback.insert(c, pick))    # back after the fsynced commit
"""

from __future__ import annotations

from pairloop.store import (
    archive,
    audit,
    backup,
    canaries,
    counts,
    cycles,
    datasets,
    deliveries,
    doctor,
    duels,
    erasures,
    events,
    feedback,
    files,
    gold,
    groups,
    jobs,
    keys,
    leases,
    picked,
    quarantines,
    queue,
    raters,
    removed,
    repair,
    repairs,
    replies,
    reservations,
    restore,
    runs,
    stored,
    traffic,
    triggers,
    verdicts,
    versions,
)
from pairloop.store.artifacts import Artifact, Artifacts
from pairloop.store.ids import new_group_id, new_id, new_wire_id
from pairloop.store.store import Store
from pairloop.store.writer import Together

__all__ = [
    "Artifact",
    "Artifacts",
    "Store",
    "Together",
    "archive",
    "audit",
    "backup",
    "canaries",
    "counts",
    "cycles",
    "datasets",
    "deliveries",
    "doctor",
    "duels",
    "erasures",
    "events",
    "feedback",
    "files",
    "gold",
    "groups",
    "jobs",
    "keys",
    "leases",
    "new_group_id",
    "new_id",
    "new_wire_id",
    "picked",
    "quarantines",
    "queue",
    "raters",
    "removed",
    "repair",
    "repairs",
    "replies",
    "reservations",
    "restore",
    "runs",
    "stored",
    "traffic",
    "triggers",
    "verdicts",
    "versions",
]
