"""Feedback rows: picks, thumbs, scores and edits about a group; revised by later rows, never changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection, Row, Select

from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.store import groups, marks
from pairloop.store.bulk import BulkInsert
from pairloop.store.schema import feedback
from pairloop.store.schema import groups as group_table
from pairloop.types import PREFERENCE_METRIC, Feedback, GroupKind, Label, LabelledGroup, Pool, Source

WHOLE_GROUP = -1
"""What the column choice_index holds where the feedback is about the group as a whole."""

_KEY = (feedback.c.group_id, feedback.c.rater_id, feedback.c.metric, feedback.c.choice_index)
_INSERT = sa.insert(feedback)
_BY_ID = sa.select(feedback).where(feedback.c.feedback_id == sa.bindparam("feedback_id"))
_BY_GROUP = sa.select(feedback).where(feedback.c.group_id == sa.bindparam("group_id")).order_by(feedback.c.seq)
_IN_GROUPS = (
    sa.select(feedback).where(feedback.c.group_id.in_(sa.bindparam("group_ids", expanding=True))).order_by(feedback.c.seq)
)
_POLICY_OF_GROUP = sa.select(group_table.c.policy).where(group_table.c.group_id == sa.bindparam("group_id"))
_LAST_REVISION = sa.select(sa.func.max(feedback.c.revision)).where(*(column == sa.bindparam(column.name) for column in _KEY))
_LAST_REVISIONS = (
    sa.select(*_KEY, sa.func.max(feedback.c.revision))
    .where(feedback.c.group_id.in_(sa.bindparam("group_ids", expanding=True)))
    .group_by(*_KEY)
)
_KNOWN = sa.select(feedback.c.feedback_id).where(feedback.c.feedback_id.in_(sa.bindparam("feedback_ids", expanding=True)))
_COLUMNS = (
    "feedback_id",
    "group_id",
    "metric",
    "source",
    "rater_id",
    "label",
    "choice_index",
    "value",
    "text",
    "shown_order",
    "latency_ms",
    "tags",
    "created_at",
)
_INSERT_NEW = BulkInsert(feedback, (*_COLUMNS, "policy", "revision"))


def insert(c: Connection, row: Feedback) -> tuple[Feedback, bool]:
    """Write one row; returns it with its revision, and whether it was there already (a replay changes nothing).

    A row of the same rater, group, metric and choice is a revision of the earlier ones. Raises NotFoundError for an unknown
    group, ConflictError where the id was used for another body, InvalidRequestError for a value that is not finite.
    """
    stored = get(c, row.feedback_id)
    if stored is not None:
        if _body(stored) != _body(row):
            raise ConflictError(f"feedback {row.feedback_id} exists with another body; a new pick needs a new id")
        return stored, True
    if isinstance(row.value, float) and not math.isfinite(row.value):
        raise InvalidRequestError(f"value {row.value} is not a finite number", param="value")
    policy = c.execute(_POLICY_OF_GROUP, {"group_id": row.group_id}).scalar()
    if policy is None:
        raise NotFoundError(f"no group {row.group_id}", param="group_id")
    values = _row(row)
    last = c.execute(_LAST_REVISION, {column.name: values[column.name] for column in _KEY}).scalar()
    revision = 0 if last is None else last + 1
    c.execute(_INSERT, {**values, "policy": policy, "revision": revision})
    return replace(row, revision=revision), False


def insert_new(c: Connection, rows: Sequence[Feedback], policies: Sequence[str]) -> None:
    """Write rows whose ids and revisions are known to be free, with their groups' policies. Raises IntegrityError."""
    _INSERT_NEW(c, [(*_values(row), policy, row.revision) for row, policy in zip(rows, policies, strict=True)])


def last_revisions(c: Connection, group_ids: Collection[str]) -> dict[tuple[str, str, str, int | None], int]:
    """The highest revision of each group, rater, metric and choice that were spoken of in these groups."""
    return {
        (row[0], row[1], row[2], None if row[3] == WHOLE_GROUP else row[3]): row[4]
        for row in c.execute(_LAST_REVISIONS, {"group_ids": list(group_ids)})
    }


def known_ids(c: Connection, feedback_ids: Collection[str]) -> set[str]:
    """Those of the ids that are taken."""
    return set(c.execute(_KNOWN, {"feedback_ids": list(feedback_ids)}).scalars()) if feedback_ids else set()


def get(c: Connection, feedback_id: str) -> Feedback | None:
    row = c.execute(_BY_ID, {"feedback_id": feedback_id}).first()
    return None if row is None else _feedback(row)


def for_group(c: Connection, group_id: str) -> list[Feedback]:
    """What counts about a group: the latest revision of each rater, metric and choice, in order of arrival."""
    return latest_revisions(history(c, group_id))


def history(c: Connection, group_id: str) -> list[Feedback]:
    """Everything that was ever said about a group, in order of arrival."""
    return [_feedback(row) for row in c.execute(_BY_GROUP, {"group_id": group_id})]


def labelled_since(
    c: Connection, policy: str, *, after_seq: int, kinds: Collection[GroupKind], again: Collection[str] = ()
) -> tuple[list[LabelledGroup], int]:
    """Groups of these kinds with feedback newer than ``after_seq``, oldest group first, and the highest seq of the policy.

    Each group comes with all its counting feedback; what was said by ``after_seq`` is named in ``earlier``, also where it was
    only said again since. Groups ``again`` come whatever their age, with nothing ``earlier``. Linear in the new rows.
    """
    highest = max(after_seq, max_seq(c, policy))
    touched = sa.select(feedback.c.group_id).where(
        feedback.c.policy == policy, feedback.c.seq > after_seq, feedback.c.seq <= highest
    )
    of_kind = sa.select(group_table).where(group_table.c.kind.in_([kind.value for kind in kinds]))
    in_order = of_kind.order_by(group_table.c.created_at, group_table.c.group_id)
    found = labelled(c, in_order.where(group_table.c.group_id.in_(touched)), after_seq=after_seq)
    if again:
        found = [one for one in found if one.group.group_id not in again]
        for ids in groups.chunked(list(again)):
            found += labelled(c, of_kind.where(group_table.c.group_id.in_(ids)))
        found.sort(key=lambda one: (one.group.created_at, one.group.group_id))
    return found, highest


def latest_revisions(rows: Iterable[Feedback]) -> list[Feedback]:
    """Of rows in order of arrival, the last of each rater, group, metric and choice: what counts everywhere but in duels."""
    last: dict[tuple[Any, ...], Feedback] = {}
    for row in rows:
        key = _about(row)
        last.pop(key, None)
        last[key] = row
    return list(last.values())


def _about(row: Feedback) -> tuple[Any, ...]:
    """What a later row with the same key revises."""
    return (row.group_id, row.rater_id, row.metric, row.choice_index)


def _says(row: Feedback) -> tuple[Any, ...]:
    return (row.label, row.value, row.text)


def first_revisions(rows: Iterable[Feedback]) -> list[Feedback]:
    """The rows that revise nothing: what counts in a duel."""
    return [row for row in rows if row.revision == 0]


def labelled(
    c: Connection,
    statement: Select[Any],
    *,
    counting: Callable[[Iterable[Feedback]], list[Feedback]] = latest_revisions,
    after_seq: int = 0,
) -> list[LabelledGroup]:
    """The groups of a select over the groups table, in its order, each with the feedback that counts."""
    found = groups.load(c, statement)
    rows: dict[str, list[Feedback]] = {group.group_id: [] for group in found}
    old: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # what each rater had last said about each thing by after_seq
    for ids in groups.chunked(list(rows)):
        for row in c.execute(_IN_GROUPS, {"group_ids": ids}):
            feedback = _feedback(row)
            rows[row.group_id].append(feedback)
            if row.seq <= after_seq:
                old[_about(feedback)] = _says(feedback)
    labelled_groups = []
    for group in found:
        counted = tuple(counting(rows[group.group_id]))
        earlier = frozenset(row.feedback_id for row in counted if old.get(_about(row)) == _says(row))
        labelled_groups.append(LabelledGroup(group, counted, earlier))
    return labelled_groups


def max_seq(c: Connection, policy: str) -> int:
    """The sequence number of the policy's newest row; 0 without any."""
    return c.execute(sa.select(sa.func.max(feedback.c.seq)).where(feedback.c.policy == policy)).scalar() or 0


def count_new_picks(c: Connection, policy: str, *, after_seq: int, pool: Pool, quarantined: Collection[str] = ()) -> int:
    """Decisive picks (A or B) newer than ``after_seq`` that no later revision replaced. Linear in the new rows.

    Those of ``quarantined`` people, and about groups that were excluded, are not counted.
    """
    statement = (
        sa.select(sa.func.count())
        .select_from(feedback.join(group_table))
        .where(
            feedback.c.policy == policy,
            feedback.c.seq > after_seq,
            feedback.c.metric == PREFERENCE_METRIC,
            feedback.c.label.in_([Label.A.value, Label.B.value]),
            group_table.c.pool == pool.value,
            is_latest(),
            ~marks.is_marked(feedback.c.group_id, marks.Mark.EXCLUDED),
        )
    )
    if quarantined:
        statement = statement.where(sa.or_(feedback.c.source != Source.HUMAN.value, feedback.c.rater_id.not_in(quarantined)))
    return c.execute(statement).scalar_one()


def is_latest() -> ColumnElement[bool]:
    """A condition on the feedback table: no later revision replaced this row."""
    later = feedback.alias("later")
    same = [later.c[column.name] == column for column in _KEY]
    return ~sa.exists().where(*same, later.c.revision > feedback.c.revision)


def recent(c: Connection, policy: str, limit: int) -> list[Feedback]:
    """The newest rows, newest first."""
    statement = sa.select(feedback).where(feedback.c.policy == policy).order_by(feedback.c.seq.desc()).limit(limit)
    return [_feedback(row) for row in c.execute(statement)]


def _body(row: Feedback) -> dict[str, Any]:
    """What the client said, without what the server added (time and revision). True is not 1 here, as it is in Python."""
    return {**_row(row), "created_at": None, "value": (type(row.value) is bool, row.value)}


def _row(row: Feedback) -> dict[str, Any]:
    return dict(zip(_COLUMNS, _values(row), strict=True))


def _values(row: Feedback) -> tuple[Any, ...]:
    """In the order of ``_COLUMNS``."""
    return (
        row.feedback_id,
        row.group_id,
        row.metric,
        row.source.value,
        row.rater_id,
        None if row.label is None else row.label.value,
        WHOLE_GROUP if row.choice_index is None else row.choice_index,
        row.value,
        row.text,
        list(row.shown_order),
        row.latency_ms,
        dict(row.tags),
        row.created_at,
    )


def _feedback(row: Row[Any]) -> Feedback:
    return Feedback(
        feedback_id=row.feedback_id,
        group_id=row.group_id,
        metric=row.metric,
        source=Source(row.source),
        rater_id=row.rater_id,
        created_at=row.created_at,
        label=None if row.label is None else Label(row.label),
        choice_index=None if row.choice_index == WHOLE_GROUP else row.choice_index,
        value=row.value,
        text=row.text,
        shown_order=tuple(row.shown_order),
        latency_ms=row.latency_ms,
        revision=row.revision,
        tags=row.tags,
    )
