"""Lineage forwards: into which datasets and versions feedback went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.schema import (
    aliases,
    completions,
    dataset_pairs,
    datasets,
    duels,
    feedback,
    groups,
    pair_feedback,
    runs,
    versions,
)
from pairloop.types import Alias, GroupKind, Label, Pool, RunStatus

BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """What is told of an answer without its text."""

    version: int | None
    tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Trace:
    """A feedback row, the answers that it is about by index, and what was made of it.

    ``datasets`` and ``versions`` hold it, the oldest first.
    """

    feedback_id: str
    group_id: str
    metric: str
    label: Label | None
    kind: GroupKind
    pool: Pool
    duel_id: str | None
    in_open_duel: bool
    answers: tuple[Answer, ...]
    datasets: tuple[str, ...]
    versions: tuple[int, ...]
    is_training: bool


def traces(c: Connection, policy: str, feedback_ids: Collection[str]) -> list[Trace]:
    """Of the feedback that there is, in the order of its ids. A handful of statements, however many rows there are."""
    told = (feedback.c.feedback_id, feedback.c.group_id, feedback.c.metric, feedback.c.label)
    is_open = (duels.c.duel_id.is_not(None) & duels.c.closed_at.is_(None)).label("is_open")
    statement = (
        sa.select(*told, groups.c.kind, groups.c.pool, groups.c.duel_id, is_open)
        .select_from(feedback.join(groups).outerjoin(duels, duels.c.duel_id == groups.c.duel_id))
        .where(feedback.c.feedback_id.in_(feedback_ids), feedback.c.policy == policy)
    )
    rows = {row.feedback_id: row for row in c.execute(statement)}
    answers = _answers(c, {row.group_id for row in rows.values()})
    holding = _holding(c, list(rows))
    in_use = {dataset_id for ids in holding.values() for dataset_id in ids}
    trained, training = _trained(c, policy, in_use), _training(c, in_use)
    found = []
    for feedback_id in dict.fromkeys(feedback_ids):
        row = rows.get(feedback_id)
        if row is None:
            continue
        held = holding.get(feedback_id, [])
        found.append(
            Trace(
                feedback_id=feedback_id,
                group_id=row.group_id,
                metric=row.metric,
                label=None if row.label is None else Label(row.label),
                kind=GroupKind(row.kind),
                pool=Pool(row.pool),
                duel_id=row.duel_id,
                in_open_duel=row.is_open,
                answers=tuple(answers.get(row.group_id, ())),
                datasets=tuple(held),
                versions=tuple(sorted({number for dataset_id in held for number in trained.get(dataset_id, ())})),
                is_training=not training.isdisjoint(held),
            )
        )
    return found


def serving(c: Connection, policy: str) -> frozenset[int]:
    """The champion and all that it descends from: what their data taught is in the answers that people get."""
    tree = sa.select(versions.c.number, versions.c.parent).where(versions.c.policy == policy)
    parents: dict[int, int | None] = {row.number: row.parent for row in c.execute(tree)}
    statement = sa.select(aliases.c.number).where(aliases.c.policy == policy, aliases.c.alias == Alias.CHAMPION.value)
    at: int | None = c.execute(statement).scalar()
    line = set()
    while at is not None:
        line.add(at)
        at = parents.get(at)
    return frozenset(line)


def _answers(c: Connection, group_ids: Collection[str]) -> dict[str, list[Answer]]:
    size = sa.func.length(completions.c.token_ids, type_=sa.Integer())
    statement = sa.select(completions.c.group_id, completions.c.version, size, completions.c.finish_reason).where(
        completions.c.group_id.in_(group_ids)
    )
    found: dict[str, list[Answer]] = defaultdict(list)
    for group_id, version, n_bytes, reason in c.execute(statement.order_by(completions.c.group_id, completions.c.position)):
        found[group_id].append(Answer(version, n_bytes // BYTES_PER_TOKEN, reason))
    return found


def _holding(c: Connection, feedback_ids: Collection[str]) -> dict[str, list[str]]:
    """The datasets that hold a pair made of each row."""
    joined = pair_feedback.join(dataset_pairs, dataset_pairs.c.pair_id == pair_feedback.c.pair_id).join(
        datasets, datasets.c.dataset_id == dataset_pairs.c.dataset_id
    )
    statement = (
        sa.select(pair_feedback.c.feedback_id, datasets.c.dataset_id)
        .select_from(joined)
        .where(pair_feedback.c.feedback_id.in_(feedback_ids))
        .order_by(datasets.c.created_at, datasets.c.feedback_seq)
    )
    found: dict[str, list[str]] = defaultdict(list)
    for feedback_id, dataset_id in c.execute(statement):
        if dataset_id not in found[feedback_id]:
            found[feedback_id].append(dataset_id)
    return found


def _trained(c: Connection, policy: str, dataset_ids: Collection[str]) -> dict[str, list[int]]:
    """The versions that were trained on each dataset; a checkpoint on the way is none of its own."""
    statement = sa.select(versions.c.dataset_id, versions.c.number).where(
        versions.c.policy == policy, versions.c.dataset_id.in_(dataset_ids), versions.c.step_number.is_(None)
    )
    found: dict[str, list[int]] = defaultdict(list)
    for dataset_id, number in c.execute(statement):
        found[dataset_id].append(number)
    return found


def _training(c: Connection, dataset_ids: Collection[str]) -> set[str]:
    statement = sa.select(runs.c.dataset_id).where(runs.c.dataset_id.in_(dataset_ids), runs.c.status == RunStatus.RUNNING.value)
    return set(c.execute(statement).scalars())
