"""What people said of comparisons, narrow: a row of each, without the texts, for whoever counts many of them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Row, Select

from pairloop.store.schema import completions, feedback, groups
from pairloop.types import GOLD_METRIC, PREFERENCE_METRIC, REPEAT_METRIC, FinishReason, GroupKind, Label, Source

METRICS = (PREFERENCE_METRIC, REPEAT_METRIC, GOLD_METRIC)


class Picked(NamedTuple):
    """What a rater first said of a comparison, or last (``revision``).

    ``keys`` tell the two answers apart, ``lengths`` are in characters, ``first_index`` is the answer that stood in the first
    place. ``question`` is the same for the same prompt with the same two answers, however they are ordered.
    """

    seq: int
    feedback_id: str
    group_id: str
    rater_id: str
    metric: str
    label: Label
    first_index: int
    latency_ms: int | None
    revision: int
    created_at: datetime
    kind: GroupKind
    duel_id: str | None
    versions: tuple[int | None, int | None]
    lengths: tuple[int, int]
    keys: tuple[str, str]
    prompt_hash: str

    @property
    def question(self) -> str:
        return f"{self.prompt_hash}/{'/'.join(sorted(self.keys))}"

    @property
    def chosen(self) -> int | None:
        """The index of the chosen answer."""
        return {Label.A: 0, Label.B: 1}.get(self.label)


def newest(c: Connection, policy: str, limit: int) -> list[Picked]:
    """What people first said, the newest first: votes, repeats and gold; at most so many rows, erased groups left out."""
    return _read(c, _rows(policy).where(feedback.c.revision == 0), limit)


def of_rater(
    c: Connection, policy: str, rater_id: str, *, before: int | None = None, limit: int, metrics: Collection[str] = METRICS
) -> list[Picked]:
    """All that one rater said, revisions too, newest first; what came before the row ``before``."""
    mine = _rows(policy, metrics).where(feedback.c.rater_id == rater_id)
    return _read(c, mine if before is None else mine.where(feedback.c.seq < before), limit)


def _rows(policy: str, metrics: Collection[str] = METRICS) -> Select[Any]:
    return sa.select(feedback.c.seq).where(
        feedback.c.policy == policy, feedback.c.metric.in_(metrics), feedback.c.source == Source.HUMAN.value
    )


def _read(c: Connection, rows: Select[Any], limit: int) -> list[Picked]:
    """The rows of the select first, by their index, and then what they are about."""
    wanted = rows.order_by(feedback.c.seq.desc()).limit(limit).subquery()
    one, other, third = (completions.alias(name) for name in ("one", "other", "third"))
    statement = (
        sa.select(
            feedback.c.seq,
            feedback.c.feedback_id,
            feedback.c.group_id,
            feedback.c.rater_id,
            feedback.c.metric,
            feedback.c.label,
            sa.cast(feedback.c.shown_order, sa.Text).label("shown"),
            feedback.c.latency_ms,
            feedback.c.revision,
            feedback.c.created_at,
            groups.c.kind,
            groups.c.duel_id,
            groups.c.prompt_hash,
            one.c.version.label("version_0"),
            other.c.version.label("version_1"),
            sa.func.length(one.c.text).label("length_0"),
            sa.func.length(other.c.text).label("length_1"),
            one.c.answer_key.label("key_0"),
            other.c.answer_key.label("key_1"),
        )
        .select_from(
            wanted.join(feedback, feedback.c.seq == wanted.c.seq)
            .join(groups, groups.c.group_id == feedback.c.group_id)
            .join(one, sa.and_(one.c.group_id == groups.c.group_id, one.c.position == 0))
            .join(other, sa.and_(other.c.group_id == groups.c.group_id, other.c.position == 1))
            .outerjoin(third, sa.and_(third.c.group_id == groups.c.group_id, third.c.position == 2))
        )
        .where(third.c.group_id.is_(None), one.c.finish_reason != FinishReason.ERASED.value)
        .order_by(feedback.c.seq.desc())
    )
    return [_picked(row) for row in c.execute(statement)]


def _picked(row: Row[Any]) -> Picked:
    return Picked(
        seq=row.seq,
        feedback_id=row.feedback_id,
        group_id=row.group_id,
        rater_id=row.rater_id,
        metric=row.metric,
        label=Label(row.label),
        first_index=1 if row.shown.startswith("[1") else 0,
        latency_ms=row.latency_ms,
        revision=row.revision,
        created_at=row.created_at,
        kind=GroupKind(row.kind),
        duel_id=row.duel_id,
        versions=(row.version_0, row.version_1),
        lengths=(row.length_0, row.length_1),
        keys=(row.key_0, row.key_1),
        prompt_hash=row.prompt_hash,
    )
