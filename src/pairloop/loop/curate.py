"""Curating: what an operator decides about groups that were picked from, one by one or all that filters find; and their export.

Nothing is deleted: exclusions are marks that can be taken away, a relabelling is a later revision beside what its rater said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.formats.writer import Rows
from pairloop.store import Store, audit, feedback, groups, marks, new_id, preferences, set_aside
from pairloop.store.audit import AuditAction
from pairloop.store.marks import Mark
from pairloop.store.preferences import Place, Wanted
from pairloop.store.schema import groups as group_table
from pairloop.store.subjects import EXPERT
from pairloop.types import (
    DEMONSTRATION_METRIC,
    PREFERENCE_METRIC,
    RELABELLED_TAG,
    SCORE_METRIC,
    THUMBS_METRIC,
    Feedback,
    Group,
    GroupKind,
    Label,
    LabelledGroup,
    Source,
)

MAX_GROUPS = 10_000
"""So many groups one decision may be about: it is one transaction."""
MAX_RELABELLED = 1_000

_EXPORTED = (PREFERENCE_METRIC, SCORE_METRIC, THUMBS_METRIC, DEMONSTRATION_METRIC)
"""A row of a file says one kind of thing: of a group's feedback the first of these that there is."""
_ACTIONS = {
    (Mark.EXCLUDED, True): AuditAction.EXCLUDE,
    (Mark.EXCLUDED, False): AuditAction.INCLUDE,
    (Mark.QUEUED, True): AuditAction.ENQUEUE,
    (Mark.QUEUED, False): AuditAction.DEQUEUE,
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Groups by their ids, or exactly those that filters find."""

    group_ids: tuple[str, ...] = ()
    wanted: Wanted | None = None


@dataclass(frozen=True, slots=True)
class Decided:
    """``selected`` groups, and those of them on which the decision ``changed`` something."""

    selected: int
    changed: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Who decides, and why; with ``dryrun`` nothing is written."""

    actor: str
    reason: str
    dryrun: bool = False


def mark(store: Store, config: Config, selection: Selection, kind: Mark, decision: Decision, *, is_set: bool) -> Decided:
    """Exclude groups from training or send them to the labelling queue, or take that back."""
    decision = replace(decision, reason=store.kept_words(decision.reason))
    ids = selected(store, config, selection, MAX_GROUPS)
    policy = config.policy.name
    if decision.dryrun:
        with store.reading() as c:
            there = marks.set_on(c, kind, ids)
        return Decided(len(ids), sum((group_id in there) is not is_set for group_id in ids))

    def write(c: Connection) -> Decided:
        at = datetime.now(UTC)
        changed = marks.put(c, policy, kind, ids, is_set=is_set, reason=decision.reason, at=at)
        if kind is Mark.EXCLUDED and not is_set:
            set_aside.ask_again(c, changed, Mark.EXCLUDED.value)
        _record(c, policy, _ACTIONS[kind, is_set], ids, decision, {"groups": len(ids), "changed": len(changed)})
        return Decided(len(ids), len(changed))

    return store.write(write)


def relabel(store: Store, config: Config, selection: Selection, label: Label, decision: Decision) -> Decided:
    """Let people's votes say ``label``: each that says otherwise gets a later revision, and what its rater said stays.

    Where nobody picked yet it is the operator's own vote. Not in duels, whose first votes count for good, and not where there
    are no two whole answers.
    """
    decision = replace(decision, reason=store.kept_words(decision.reason))
    own = f"{EXPERT}{decision.actor}" if store.redactor is None else store.redactor.identifier(f"{EXPERT}{decision.actor}")
    ids = selected(store, config, selection, MAX_RELABELLED)
    policy = config.policy.name

    def rows_of(c: Connection) -> list[Feedback]:
        found: list[LabelledGroup] = []
        for some in groups.chunked(ids):
            found += feedback.labelled(c, sa.select(group_table).where(group_table.c.group_id.in_(some)))
        return list(chain.from_iterable(_revised(labelled, label, decision, own) for labelled in found))

    if decision.dryrun:
        with store.reading() as c:
            return Decided(len(ids), _groups_of(rows_of(c)))

    def write(c: Connection) -> Decided:
        rows = rows_of(c)
        for row in rows:
            feedback.insert(c, row)
        details = {"groups": len(ids), "changed": _groups_of(rows), "label": label.value}
        _record(c, policy, AuditAction.RELABEL, ids, decision, details)
        return Decided(len(ids), _groups_of(rows))

    return store.write(write)


def selected(store: Store, config: Config, selection: Selection, limit: int) -> list[str]:
    """The ids that are meant; NotFoundError for an unknown one, InvalidRequestError for more than ``limit``."""
    policy = config.policy.name
    ids = list(dict.fromkeys(selection.group_ids))
    with store.reading() as c:
        if selection.wanted is None:
            known = _known(c, policy, ids)
            unknown = next((group_id for group_id in ids if group_id not in known), None)
            if unknown is not None:
                raise NotFoundError(f"no group {unknown!r} of {policy}", param="ids")
        else:
            for part in preferences.each(c, policy, selection.wanted, preferences.first(c, policy)):
                ids += part
                if len(ids) > limit:
                    break
    if len(ids) > limit:
        raise InvalidRequestError(f"more than {limit:,} groups at once; narrow the filters, by date say", param="filters")
    return ids


def export(store: Store, config: Config, wanted: Wanted, at: Place, format_name: str) -> Iterator[str]:
    """What filters find, newest first, as lines of a format that `pairloop data import` reads.

    Of each group the picks, else its scores, thumbs or demonstrations. What the format cannot hold is left out. UserError for
    an unknown format, at once.
    """
    rows = Rows(format_name)

    def lines() -> Iterator[str]:
        place: Place | None = at
        while place is not None:
            with store.reading() as c:  # a short one each time: the file may take minutes
                found = preferences.page(c, config.policy.name, wanted, place, preferences.WINDOW)
            for ids in groups.chunked(found.group_ids):
                with store.reading() as c:
                    labelled = _labelled(c, ids)
                yield from rows.lines(_one_kind(one) for one in labelled)
            place = found.next

    return lines()


def _labelled(c: Connection, group_ids: Sequence[str]) -> list[LabelledGroup]:
    """In the order of the ids."""
    statement = sa.select(group_table).where(group_table.c.group_id.in_(group_ids))
    found = {labelled.group.group_id: labelled for labelled in feedback.labelled(c, statement)}
    return [found[group_id] for group_id in group_ids if group_id in found]


def _one_kind(labelled: LabelledGroup) -> LabelledGroup:
    said = {row.metric for row in labelled.feedback}
    metric = next((metric for metric in _EXPORTED if metric in said), None)
    return replace(labelled, feedback=tuple(row for row in labelled.feedback if row.metric == metric))


def _revised(labelled: LabelledGroup, label: Label, decision: Decision, own: str) -> Iterator[Feedback]:
    """``own``: the rater id of a vote that is the operator's."""
    group = labelled.group
    if group.kind is GroupKind.DUEL or group.is_abandoned or group.is_erased or len(group.completions) != 2:
        return
    votes = [row for row in labelled.feedback if row.metric == PREFERENCE_METRIC and row.source is Source.HUMAN]
    raters = {row.rater_id: row.shown_order for row in votes if row.label not in (label, Label.SKIP)}
    for rater_id, shown_order in raters.items() if votes else ((own, ()),):
        yield _vote(group, rater_id, shown_order, label, decision)


def _vote(group: Group, rater_id: str, shown_order: tuple[int, ...], label: Label, decision: Decision) -> Feedback:
    return Feedback(
        feedback_id=new_id("feedback"),
        group_id=group.group_id,
        metric=PREFERENCE_METRIC,
        source=Source.HUMAN,
        rater_id=rater_id,
        created_at=datetime.now(UTC),
        label=label,
        text=decision.reason,
        shown_order=shown_order,
        tags={RELABELLED_TAG: decision.actor},
    )


def _groups_of(rows: Collection[Feedback]) -> int:
    return len({row.group_id for row in rows})


def _known(c: Connection, policy: str, ids: Sequence[str]) -> set[str]:
    known: set[str] = set()
    for some in groups.chunked(ids):
        statement = sa.select(group_table.c.group_id).where(group_table.c.group_id.in_(some), group_table.c.policy == policy)
        known |= set(c.execute(statement).scalars())
    return known


def _record(
    c: Connection, policy: str, action: AuditAction, ids: Sequence[str], decision: Decision, details: dict[str, int | str]
) -> None:
    subject = f"group:{ids[0]}" if len(ids) == 1 else f"{len(ids)} groups of {policy}"
    audit.record(c, action, actor=decision.actor, subject=subject, reason=decision.reason, details=details)
