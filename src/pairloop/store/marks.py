"""Marks: what an operator decided about single groups. Rows are appended, the newest one holds; the group stays as it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection

from pairloop.store.groups import chunked
from pairloop.store.schema import audit, feedback, gold_items, groups, marks
from pairloop.types import PREFERENCE_METRIC, GroupKind, Pool, Source


class Mark(StrEnum):
    """``excluded``: kept, and not trained on; ``queued``: to be shown to raters again."""

    EXCLUDED = "excluded"
    QUEUED = "queued"


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision about a group."""

    group_id: str
    mark: Mark
    is_set: bool
    reason: str
    created_at: datetime


def put(
    c: Connection, policy: str, mark: Mark, group_ids: Collection[str], *, is_set: bool, reason: str, at: datetime
) -> list[str]:
    """Set the mark on groups, or take it away; ids of those on which that changed something."""
    there = set_on(c, mark, group_ids)
    changed = [group_id for group_id in dict.fromkeys(group_ids) if (group_id in there) is not is_set]
    row = {"policy": policy, "mark": mark.value, "is_set": is_set, "reason": reason, "created_at": at}
    if changed:
        c.execute(sa.insert(marks), [{**row, "group_id": group_id} for group_id in changed])
    return changed


def set_on(c: Connection, mark: Mark, group_ids: Collection[str]) -> set[str]:
    """Those of the groups that have the mark."""
    found: set[str] = set()
    for ids in chunked(list(group_ids)):
        statement = sa.select(marks.c.group_id).where(marks.c.group_id.in_(ids), marks.c.mark == mark.value, *_holds())
        found |= set(c.execute(statement).scalars())
    return found


def marked(c: Connection, policy: str, mark: Mark) -> set[str]:
    """Every group of the policy that has the mark."""
    statement = sa.select(marks.c.group_id).where(marks.c.policy == policy, marks.c.mark == mark.value, *_holds())
    return set(c.execute(statement).scalars())


def history(c: Connection, group_id: str) -> list[Decision]:
    """What was decided about a group, oldest first."""
    rows = c.execute(sa.select(marks).where(marks.c.group_id == group_id).order_by(marks.c.seq))
    return [Decision(row.group_id, Mark(row.mark), row.is_set, row.reason, row.created_at) for row in rows]


def max_seq(c: Connection, policy: str) -> int:
    """The number of the policy's newest decision; 0 without any."""
    return c.execute(sa.select(sa.func.max(marks.c.seq)).where(marks.c.policy == policy)).scalar() or 0


def is_marked(group_id: ColumnElement[str], mark: Mark) -> ColumnElement[bool]:
    """A condition: the group has the mark."""
    return sa.exists().where(marks.c.group_id == group_id, marks.c.mark == mark.value, *_holds())


def queued(c: Connection, policy: str, pool: Pool, rater_id: str, limit: int) -> list[str]:
    """Ids of the pool's groups that were sent to the labelling queue, oldest first, of which this rater has said nothing.

    One that a person picked from since then is served. Neither duels, whose votes are the gate's, nor gold items, whose answers
    are no votes.
    """
    said = [feedback.c.group_id == marks.c.group_id, feedback.c.metric == PREFERENCE_METRIC]
    own = sa.exists().where(feedback.c.group_id == marks.c.group_id, feedback.c.rater_id == rater_id)
    is_gold = sa.exists().where(gold_items.c.group_id == marks.c.group_id)
    since = sa.exists().where(*said, feedback.c.source == Source.HUMAN.value, feedback.c.created_at > marks.c.created_at)
    statement = (
        sa.select(marks.c.group_id)
        .select_from(marks.join(groups, groups.c.group_id == marks.c.group_id))
        .where(marks.c.policy == policy, marks.c.mark == Mark.QUEUED.value, *_holds())
        .where(groups.c.pool == pool.value, groups.c.kind != GroupKind.DUEL.value, ~own, ~since, ~is_gold)
    )
    return list(c.execute(statement.order_by(marks.c.seq).limit(limit)).scalars())


def forget(c: Connection, group_ids: Sequence[str]) -> None:
    """Of groups that are erased: what was decided stays, the words about it go, in the audit trail, too; none stays gold."""
    c.execute(sa.update(marks).where(marks.c.group_id.in_(group_ids)).values(reason=""))
    c.execute(sa.delete(gold_items).where(gold_items.c.group_id.in_(group_ids)))
    subjects = [*group_ids, *(f"group:{group_id}" for group_id in group_ids)]
    c.execute(sa.update(audit).where(audit.c.subject.in_(subjects)).values(reason=""))


def _holds() -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    later = marks.alias("later_mark")
    same = (later.c.group_id == marks.c.group_id, later.c.mark == marks.c.mark)
    return marks.c.is_set.is_(True), ~sa.exists().where(*same, later.c.seq > marks.c.seq)
