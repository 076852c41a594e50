"""Stored completions: the groups that the wire lists, with the metadata that their clients may replace; and their erasure.

A group is evidence and stays as it was; what may change about it on the wire stands here. ``group_id`` rises with time, so it
orders a listing and is its cursor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection

from pairloop.store import groups, marks, replies, samples
from pairloop.store.schema import stored_completions, stored_metadata
from pairloop.types import Group, GroupKind

_INSERT = sa.insert(stored_completions)
_INSERT_METADATA = sa.insert(stored_metadata)
_KEPT = sa.select(stored_completions).where(
    stored_completions.c.group_id == sa.bindparam("group_id"), stored_completions.c.deleted_at.is_(None)
)


@dataclass(frozen=True, slots=True)
class StoredCompletion:
    """A group as the wire shows it; ``metadata`` is its client's last word, ``group.metadata`` the first."""

    group: Group
    metadata: Mapping[str, str]


def insert(c: Connection, group: Group, *, is_listed: bool = True) -> None:
    """Make a whole group (with its completions) one that the wire shows; ``is_listed`` False keeps it out of listings."""
    c.execute(
        _INSERT,
        {
            "group_id": group.group_id,
            "policy": group.policy,
            "model": _model(group),
            "metadata": dict(group.metadata),
            "is_listed": is_listed,
            "deleted_at": None,
        },
    )
    if is_listed:
        _insert_metadata(c, group.policy, group.group_id, group.metadata)


def get(c: Connection, group_id: str) -> StoredCompletion | None:
    """A stored completion, listed or not; None where there is none, or it was deleted."""
    row = c.execute(_KEPT, {"group_id": group_id}).first()
    group = groups.get(c, group_id) if row is not None else None
    return None if row is None or group is None else StoredCompletion(group, row.metadata)


def page(
    c: Connection,
    policy: str,
    *,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    after: str | None = None,
    limit: int,
    newest_first: bool = False,
) -> list[StoredCompletion]:
    """The ``limit`` listed completions that follow ``after`` (the id of any, also of a deleted one), oldest first.

    ``model`` is the name that the reply told, ``metadata`` are pairs that all must be there. Read off an index: the cost is
    that of the page (with several pairs, of those that have the first one).
    """
    wanted = list((metadata or {}).items())
    source, group_id, conditions = _source(policy, wanted[0] if wanted else None)
    conditions += [_has(group_id, key, value) for key, value in wanted[1:]]
    if model is not None:
        conditions.append(stored_completions.c.model == model)
    if after is not None:
        conditions.append(group_id < after if newest_first else group_id > after)
    order = group_id.desc() if newest_first else group_id
    rows = c.execute(
        sa.select(group_id, stored_completions.c.metadata).select_from(source).where(*conditions).order_by(order).limit(limit)
    ).all()
    found = {group.group_id: group for group in groups.load_ids(c, [row.group_id for row in rows])}
    return [StoredCompletion(found[row.group_id], row.metadata) for row in rows]


def replace_metadata(c: Connection, group_id: str, metadata: Mapping[str, str]) -> StoredCompletion | None:
    """Give a stored completion other metadata; the group's own, by which conversations were linked, stays. None: see `get`."""
    row = c.execute(_KEPT, {"group_id": group_id}).first()
    if row is None:
        return None
    c.execute(sa.update(stored_completions).where(stored_completions.c.group_id == group_id).values(metadata=dict(metadata)))
    c.execute(sa.delete(stored_metadata).where(stored_metadata.c.group_id == group_id))
    if row.is_listed:
        _insert_metadata(c, row.policy, group_id, metadata)
    return get(c, group_id)


def delete(c: Connection, group_id: str, at: datetime) -> bool:
    """Take a stored completion off the wire and erase its texts for good; False where there is none (any more).

    The row stays as the record of the erasure, and so do labels and numbers about the group: what was trained can be traced.
    """
    if c.execute(_KEPT, {"group_id": group_id}).first() is None:
        return False
    erase(c, [group_id], at)
    return True


def erase(c: Connection, group_ids: Sequence[str], at: datetime, *, with_user: bool = False) -> None:
    """What `delete` does, to many groups, also to those that the wire never showed; see `groups.erase`."""
    for ids in groups.chunked(group_ids):
        mine = stored_completions.c.group_id.in_(ids)
        c.execute(sa.update(stored_completions).where(mine).values(is_listed=False, metadata={}))
        c.execute(sa.update(stored_completions).where(mine, stored_completions.c.deleted_at.is_(None)).values(deleted_at=at))
        c.execute(sa.delete(stored_metadata).where(stored_metadata.c.group_id.in_(ids)))
        groups.erase(c, ids, with_user=with_user)
        marks.forget(c, ids)
        samples.forget(c, ids)
        replies.forget(c, ids)


def _source(policy: str, first: tuple[str, str] | None) -> tuple[sa.FromClause, ColumnElement[str], list[ColumnElement[bool]]]:
    """What to read from, by which id, and the conditions that lead into its index: the metadata where a pair is asked for."""
    if first is None:
        table = stored_completions
        return table, table.c.group_id, [table.c.policy == policy, table.c.is_listed.is_(True)]
    key, value = first
    pairs = stored_metadata
    joined = pairs.join(stored_completions, stored_completions.c.group_id == pairs.c.group_id)
    return joined, pairs.c.group_id, [pairs.c.policy == policy, pairs.c.key == key, pairs.c.value == value]


def _has(group_id: ColumnElement[str], key: str, value: str) -> ColumnElement[bool]:
    other = stored_metadata.alias()
    return sa.exists().where(other.c.group_id == group_id, other.c.key == key, other.c.value == value)


def _insert_metadata(c: Connection, policy: str, group_id: str, metadata: Mapping[str, str]) -> None:
    if metadata:
        rows = [{"group_id": group_id, "policy": policy, "key": key, "value": value} for key, value in metadata.items()]
        c.execute(_INSERT_METADATA, rows)


def _model(group: Group) -> str:
    """The name that the reply told: in a duel the policy's alone, so that no listing by version unblinds it."""
    version = group.completions[0].version
    return group.policy if group.kind is GroupKind.DUEL or version is None else f"{group.policy}@{version}"
