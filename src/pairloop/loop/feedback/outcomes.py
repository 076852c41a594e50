"""What is known of a conversation only later (resolved, refunded, abandoned): said once, kept for each answer that was taken.

Which answers those are is decided when the outcome comes: of each group the branch that the conversation went on from, the only
answer, or the one that a person picked. A comparison that nobody decided takes none: nothing is guessed. Each gets a value of
its own, like a thumb, with the conversation among its tags; an outcome is never a pick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.loop.feedback.values import checked_value
from pairloop.redaction import Redactor
from pairloop.store import Store, feedback, groups
from pairloop.store.ids import new_id
from pairloop.types import (
    COMMENT_METRIC,
    DEMONSTRATION_METRIC,
    PREFERENCE_METRIC,
    Feedback,
    Group,
    Label,
    Source,
)

CONVERSATION_TAG = "conversation_id"
MAX_ANSWERS = 1_000
"""Answers of one conversation that an outcome may be about: an id that everybody shares names no conversation."""


@dataclass(frozen=True, slots=True)
class ConversationValue:
    """A value about the taken answers of a conversation; ``rater_id`` None: whoever asked."""

    conversation_id: str
    metric: str
    value: bool | float | str
    comment: str | None = None
    rater_id: str | None = None
    source: Source = Source.HUMAN
    tags: Mapping[str, str] = field(default_factory=dict)
    feedback_id: str | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """The rows that an outcome became, oldest answer first, and the groups of which no answer was taken (by their ids)."""

    rows: tuple[Feedback, ...]
    undecided: tuple[str, ...]
    duplicate: bool
    dryrun: bool = False


def record_outcome(
    store: Store, outcome: ConversationValue, *, notify: Callable[[], None] | None = None, dryrun: bool = False
) -> Applied:
    """Write an outcome durably. A replay (same id, same body) changes nothing, also where the conversation has gone on.

    Raises NotFoundError (unknown conversation), ConflictError (no answer was taken yet, or the id with another body),
    InvalidRequestError.
    """
    applied = submit_outcome(store, outcome, dryrun=dryrun).result()
    if notify is not None and not applied.duplicate and not applied.dryrun:
        notify()
    return applied


def submit_outcome(store: Store, outcome: ConversationValue, *, dryrun: bool = False) -> Future[Applied]:
    """``record_outcome`` without the wait."""
    if store.redactor is not None:
        outcome = _redacted(store.redactor, outcome)
    value = _checked(outcome)
    feedback_id, now = outcome.feedback_id or new_id("feedback"), datetime.now(UTC)

    def write(c: Connection) -> Applied:
        known = _replayed(c, outcome, feedback_id)
        if known:
            return Applied(known, (), duplicate=True)
        taken, undecided = _taken(c, outcome.conversation_id)
        rows = tuple(
            Feedback(
                feedback_id=_numbered(feedback_id, place),
                group_id=group.group_id,
                metric=outcome.metric,
                source=outcome.source,
                rater_id=outcome.rater_id or group.rater_id,
                created_at=now,
                choice_index=index,
                value=value,
                text=outcome.comment,
                tags=_tags(outcome),
            )
            for place, (group, index) in enumerate(taken)
        )
        if not dryrun:
            rows = tuple(feedback.insert(c, row)[0] for row in rows)
        return Applied(rows, undecided, duplicate=False, dryrun=dryrun)

    return store.submit(write)


def _redacted(redactor: Redactor, outcome: ConversationValue) -> ConversationValue:
    """What is compared with what an earlier outcome of this id became."""
    return replace(
        outcome,
        conversation_id=redactor.identifier(outcome.conversation_id),
        value=redactor.text(outcome.value) if isinstance(outcome.value, str) else outcome.value,
        comment=None if outcome.comment is None else redactor.text(outcome.comment),
        rater_id=None if outcome.rater_id is None else redactor.identifier(outcome.rater_id),
        tags=redactor.values(outcome.tags),
    )


def _checked(outcome: ConversationValue) -> bool | float | str:
    if outcome.metric in (PREFERENCE_METRIC, COMMENT_METRIC, DEMONSTRATION_METRIC):
        raise InvalidRequestError(
            f"{outcome.metric} is about one answer; name its inference_id instead of a conversation_id", param="metric_name"
        )
    return checked_value(outcome.metric, outcome.value)


def _tags(outcome: ConversationValue) -> dict[str, str]:
    return {**outcome.tags, CONVERSATION_TAG: outcome.conversation_id}


def _numbered(feedback_id: str, place: int) -> str:
    """The outcome's own id for the first row; the others count up behind it."""
    return feedback_id if place == 0 else f"{feedback_id}.{place}"


def _replayed(c: Connection, outcome: ConversationValue, feedback_id: str) -> tuple[Feedback, ...]:
    """The rows of an earlier outcome with this id; ConflictError where that one said something else."""
    rows: list[Feedback] = []
    while (row := feedback.get(c, _numbered(feedback_id, len(rows)))) is not None:
        rows.append(row)
    for row in rows:
        rater = outcome.rater_id or row.rater_id
        said = (row.metric, type(row.value), row.value, row.text, row.rater_id, row.source, dict(row.tags))
        says = (outcome.metric, type(outcome.value), outcome.value, outcome.comment, rater, outcome.source, _tags(outcome))
        if said != says:
            raise ConflictError(f"feedback {feedback_id} exists with another body; a new outcome needs a new id")
    return tuple(rows)


def _taken(c: Connection, conversation_id: str) -> tuple[list[tuple[Group, int]], tuple[str, ...]]:
    """The answers that were taken, with their groups, oldest first; and the ids of the groups of which none was."""
    found = groups.of_conversation(c, conversation_id, limit=MAX_ANSWERS + 1)
    whole = [group for group in found if not group.is_abandoned and not group.is_erased]
    if not whole:
        raise NotFoundError(f"no conversation {conversation_id!r}", param="conversation_id")
    if len(found) > MAX_ANSWERS:
        raise InvalidRequestError(
            f"conversation {conversation_id!r} has more than {MAX_ANSWERS} answers; give each conversation an id of its own",
            param="conversation_id",
        )
    went_on = {group.parent_group_id: group.parent_index for group in whole if group.parent_index is not None}
    indices = [(group, _index(c, group, went_on)) for group in whole]
    taken = [(group, index) for group, index in indices if index is not None]
    if not taken:
        raise ConflictError(f"of conversation {conversation_id!r} no answer was taken yet; pick one, or go on with it, first")
    return taken, tuple(group.group_id for group, index in indices if index is None)


def _index(c: Connection, group: Group, went_on: Mapping[str | None, int | None]) -> int | None:
    if group.group_id in went_on:
        return went_on[group.group_id]
    if len(group.completions) == 1:
        return 0
    return _picked(feedback.for_group(c, group.group_id))


def _picked(rows: Sequence[Feedback]) -> int | None:
    """What a person picked last."""
    labels = [row.label for row in rows if row.metric == PREFERENCE_METRIC and row.source is Source.HUMAN]
    decided = [label for label in labels if label in (Label.A, Label.B)]
    return int(decided[-1] is Label.B) if decided else None
