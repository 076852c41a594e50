"""Traffic: what each process saw of each version's live answers, one row per minute. Rows older than a month are deleted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store import quarantines
from pairloop.store.schema import completions, groups, traffic
from pairloop.store.schema import feedback as feedback_table
from pairloop.types import THUMBS_METRIC

KEPT = timedelta(days=30)
FORGIVEN = "forgiven"
"""In place of a process: the row says that the errors up to its minute do not count."""


@dataclass(slots=True)
class Counts:
    """Live answers of one version; ``latency`` and ``length``: by class (`class_of`) of milliseconds per token and of tokens.

    ``errors`` are not among ``answers``; ``refusals`` are, with empty answers. ``unseen``: of answers and errors together,
    those in the shadow.
    """

    answers: int = 0
    errors: int = 0
    refusals: int = 0
    latency: Counter[int] = field(default_factory=Counter)
    length: Counter[int] = field(default_factory=Counter)
    unseen: int = 0

    @property
    def shown(self) -> int:
        """Requests that somebody sent to the version, answered or failed."""
        return self.answers + self.errors - self.unseen

    def add(self, other: Counts) -> None:
        self.answers += other.answers
        self.errors += other.errors
        self.refusals += other.refusals
        self.latency.update(other.latency)
        self.length.update(other.length)
        self.unseen += other.unseen


def put(c: Connection, policy: str, version: int, minute: datetime, process: str, counts: Counts) -> None:
    """Write what a process has counted in a minute so far, in place of what it wrote before."""
    values = {
        "answers": counts.answers,
        "errors": counts.errors,
        "refusals": counts.refusals,
        "latency": {str(key): n for key, n in counts.latency.items()},
        "length": {str(key): n for key, n in counts.length.items()},
        "unseen": counts.unseen,
    }
    this = (traffic.c.policy == policy, traffic.c.version == version, traffic.c.minute == minute, traffic.c.process == process)
    if c.execute(sa.update(traffic).where(*this).values(**values)).rowcount == 0:
        key = {"policy": policy, "version": version, "minute": minute, "process": process}
        c.execute(sa.insert(traffic), {**key, **values})


def by_minute(c: Connection, policy: str, version: int, since: datetime, until: datetime) -> dict[datetime, Counts]:
    """The counts of all processes together, by minute, without forgiven errors; ``since`` is taken down to its minute."""
    wanted = (traffic.c.policy == policy, traffic.c.version == version)
    forgiven = c.execute(sa.select(sa.func.max(traffic.c.minute)).where(*wanted, traffic.c.process == FORGIVEN)).scalar()
    when = (traffic.c.minute >= minute_of(since), traffic.c.minute < until, traffic.c.process != FORGIVEN)
    found: dict[datetime, Counts] = {}
    for row in c.execute(sa.select(traffic).where(*wanted, *when).order_by(traffic.c.minute)):
        errors = 0 if forgiven is not None and row.minute <= forgiven else row.errors
        unseen = min(row.unseen or 0, row.answers + errors)
        counts = Counts(row.answers, errors, row.refusals, _counter(row.latency), _counter(row.length), unseen)
        found.setdefault(row.minute, Counts()).add(counts)
    return found


def thumbs(c: Connection, policy: str, version: int, since: datetime, until: datetime) -> dict[datetime, tuple[int, int]]:
    """(thumbs, of them down) on the version's answers, by minute of the answer; of each rater the first one counts, and of
    those in quarantine none."""
    at, value, rater = groups.c.created_at, feedback_table.c.value, feedback_table.c.rater_id
    statement = (
        sa.select(at, value, rater)
        .select_from(
            groups.join(feedback_table, groups.c.group_id == feedback_table.c.group_id).join(
                completions,
                sa.and_(completions.c.group_id == groups.c.group_id, completions.c.position == feedback_table.c.choice_index),
            )
        )
        .where(groups.c.policy == policy, completions.c.version == version, at >= since, at < until)
        .where(feedback_table.c.metric == THUMBS_METRIC, feedback_table.c.revision == 0)
        .order_by(feedback_table.c.seq)
    )
    found: dict[datetime, tuple[int, int]] = {}
    seen = set(quarantines.current(c, policy))
    for row in c.execute(statement):
        if row.rater_id not in seen:
            seen.add(row.rater_id)
            n, down = found.get(minute_of(row.created_at), (0, 0))
            found[minute_of(row.created_at)] = (n + 1, down + (row.value is False))
    return found


def forgive(c: Connection, policy: str, version: int, until: datetime) -> None:
    """Take back the errors of all minutes up to then, also what processes have yet to write: the engine failed, not the
    version."""
    put(c, policy, version, minute_of(until), FORGIVEN, Counts())


def prune(c: Connection, now: datetime) -> None:
    """Delete what is older than `KEPT`."""
    c.execute(sa.delete(traffic).where(traffic.c.minute < now - KEPT))


def class_of(value: float) -> int:
    """The class of a positive value: four to each doubling."""
    return math.floor(4 * math.log2(max(value, 1e-6)))


def minute_of(at: datetime) -> datetime:
    return at.replace(second=0, microsecond=0)


def _counter(stored: Mapping[str, int]) -> Counter[int]:
    return Counter({int(key): n for key, n in stored.items()})
