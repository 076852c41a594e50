"""Heads of groups: what judging feedback needs to know, without texts and tokens; many in one statement."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import completions, groups
from pairloop.types import FinishReason, GroupKind, rater_of

_HEADS = (
    sa.select(
        groups.c.group_id,
        groups.c.policy,
        groups.c.kind,
        groups.c.user,
        groups.c.conversation_id,
        completions.c.version,
        completions.c.finish_reason,
    )
    .select_from(groups.outerjoin(completions))
    .where(groups.c.group_id.in_(sa.bindparam("group_ids", expanding=True)))
    .order_by(groups.c.group_id, completions.c.position)
)
_KINDS = {kind.value: kind for kind in GroupKind}


@dataclass(frozen=True, slots=True)
class GroupHead:
    """A group as feedback sees it; ``versions`` and ``finish_reasons`` by index, empty where nothing was answered."""

    group_id: str
    policy: str
    kind: GroupKind
    rater_id: str
    versions: tuple[int | None, ...]
    finish_reasons: tuple[str, ...]

    @property
    def is_abandoned(self) -> bool:
        return not self.versions or FinishReason.ABANDONED.value in self.finish_reasons

    @property
    def is_erased(self) -> bool:
        return FinishReason.ERASED.value in self.finish_reasons


def heads(c: Connection, group_ids: Collection[str]) -> dict[str, GroupHead]:
    """By id, of those groups that there are."""
    rows: dict[str, list[Sequence[Any]]] = {}
    for row in c.execute(_HEADS, {"group_ids": list(group_ids)}):
        rows.setdefault(row[0], []).append(row)
    return {group_id: _head(answers) for group_id, answers in rows.items()}


def _head(answers: list[Sequence[Any]]) -> GroupHead:
    group_id, policy, kind, user, conversation_id, _, finish_reason = answers[0]
    whole = finish_reason is not None  # else the one row of a group without answers
    return GroupHead(
        group_id,
        policy,
        _KINDS[kind],
        rater_of(user, conversation_id, group_id),
        tuple(row[5] for row in answers) if whole else (),
        tuple(row[6] for row in answers) if whole else (),
    )
