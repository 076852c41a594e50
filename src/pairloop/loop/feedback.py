"""Feedback: a pick, thumb, score, comment or edit becomes a durable row; idempotent by id, revisable, never guessed.

Rows are judged against the group they name inside the transaction that writes them. What cannot be right is refused with the
field's name; what is doubtful (an instant pick, say) is kept, and set aside later with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol

from sqlalchemy import Connection

from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.store import Store, feedback, groups
from pairloop.store.ids import new_id
from pairloop.types import (
    COMMENT_METRIC,
    DEMONSTRATION_METRIC,
    PREFERENCE_METRIC,
    SCORE_METRIC,
    THUMBS_METRIC,
    Feedback,
    Group,
    GroupKind,
    Label,
    Source,
)

COMPARISON = 2
EDIT_SUFFIX = "-edit"


class Outcome(StrEnum):
    """What a pick says in the words of the wire; CHOSEN becomes label A or B by the chosen index."""

    CHOSEN = "chosen"
    TIE = "tie"
    BOTH_BAD = "both_bad"
    SKIP = "skip"


_LABELS = {Outcome.TIE: Label.TIE, Outcome.BOTH_BAD: Label.BOTH_BAD, Outcome.SKIP: Label.SKIP}


@dataclass(frozen=True, slots=True)
class Pick:
    """A pick between the two answers of a group. ``outcome`` None means CHOSEN where an index is chosen."""

    inference_id: str
    outcome: Outcome | None = None
    chosen_index: int | None = None
    rejected_index: int | None = None
    shown_order: tuple[int, ...] = ()
    reason: str | None = None
    edited_text: str | None = None
    rater_id: str | None = None
    latency_ms: int | None = None
    source: Source = Source.HUMAN
    tags: Mapping[str, str] = field(default_factory=dict)
    feedback_id: str | None = None


@dataclass(frozen=True, slots=True)
class MetricValue:
    """A value about one completion: thumbs (bool), score (number), comment or demonstration (text), or one's own metric."""

    inference_id: str
    metric: str
    value: bool | float | str
    choice_index: int | None = None
    comment: str | None = None
    rater_id: str | None = None
    source: Source = Source.HUMAN
    tags: Mapping[str, str] = field(default_factory=dict)
    feedback_id: str | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """The row as stored (or as it would be), and its group; ``versions`` by index once a duel's pick has been made."""

    feedback: Feedback
    group: Group
    duplicate: bool
    dryrun: bool = False

    @property
    def versions(self) -> tuple[int | None, ...] | None:
        reveals = self.feedback.metric == PREFERENCE_METRIC and self.feedback.label is not Label.SKIP
        if self.dryrun or (self.group.kind is GroupKind.DUEL and not reveals):
            return None
        return tuple(completion.version for completion in self.group.completions)


class _Draft(Protocol):
    """What turns a request into rows once its group is known; the first row is the one that is answered for."""

    def __call__(self, group: Group) -> tuple[Feedback, ...]: ...


def record_preference(store: Store, pick: Pick, *, notify: Callable[[], None] | None = None, dryrun: bool = False) -> Recorded:
    """Write a pick durably. A replay (same id, same body) changes nothing and says ``duplicate``.

    Raises NotFoundError (unknown group), ConflictError (abandoned group, or the id with another body), InvalidRequestError.
    """
    return _recorded(submit_preference(store, pick, dryrun=dryrun), notify)


def record_metric(
    store: Store, value: MetricValue, *, notify: Callable[[], None] | None = None, dryrun: bool = False
) -> Recorded:
    """Write a value durably; replays and errors as in ``record_preference``."""
    return _recorded(submit_metric(store, value, dryrun=dryrun), notify)


def submit_preference(store: Store, pick: Pick, *, dryrun: bool = False) -> Future[Recorded]:
    """``record_preference`` without the wait; the future resolves after the fsynced commit."""
    feedback_id, now = pick.feedback_id or new_id("feedback"), datetime.now(UTC)
    return _submit(store, pick.inference_id, lambda group: _pick_rows(group, pick, feedback_id, now), dryrun=dryrun)


def submit_metric(store: Store, value: MetricValue, *, dryrun: bool = False) -> Future[Recorded]:
    """``record_metric`` without the wait."""
    feedback_id, now = value.feedback_id or new_id("feedback"), datetime.now(UTC)
    return _submit(store, value.inference_id, lambda group: (_value_row(group, value, feedback_id, now),), dryrun=dryrun)


def is_revealed(c: Connection, group: Group) -> bool:
    """Whether the versions behind a group may be told: always, but for a duel only once someone has picked (and for good)."""
    if group.kind is not GroupKind.DUEL:
        return True
    rows = feedback.history(c, group.group_id)
    return any(row.metric == PREFERENCE_METRIC and row.label is not Label.SKIP for row in rows)


def _submit(store: Store, inference_id: str, draft: _Draft, *, dryrun: bool) -> Future[Recorded]:
    def write(c: Connection) -> Recorded:
        group = _pickable(c, inference_id)
        rows = draft(group)
        if dryrun:
            return Recorded(rows[0], group, duplicate=False, dryrun=True)
        written = [feedback.insert(c, row) for row in rows]
        row, duplicate = written[0]
        if duplicate:
            _check_replay(c, row.feedback_id, [known for _, known in written])
        return Recorded(row, group, duplicate)

    return store.submit(write)


def _check_replay(c: Connection, feedback_id: str, known: list[bool]) -> None:
    """The edited text is a row of its own; a replay must bring it, or leave it out, as the first time."""
    edited_then, edited_now = feedback.get(c, feedback_id + EDIT_SUFFIX) is not None, len(known) > 1
    if edited_then != edited_now or not all(known):
        raise ConflictError(f"feedback {feedback_id} exists with another body (its edited_text differs)")


def _recorded(future: Future[Recorded], notify: Callable[[], None] | None) -> Recorded:
    recorded = future.result()
    if notify is not None and not recorded.duplicate and not recorded.dryrun:
        notify()
    return recorded


def _pickable(c: Connection, inference_id: str) -> Group:
    group = groups.get(c, inference_id)
    if group is None:
        raise NotFoundError(
            f"no inference {inference_id!r}; send the id of a chat completion of this server", param="inference_id"
        )
    if group.is_abandoned:
        raise ConflictError(f"{inference_id} was never answered to its end (its client went away), so it takes no feedback")
    return group


def _pick_rows(group: Group, pick: Pick, feedback_id: str, now: datetime) -> tuple[Feedback, ...]:
    n = len(group.completions)
    if n != COMPARISON:
        raise InvalidRequestError(
            f"a pick is between two answers and {group.group_id} has {n}; send values about one of them to /v1/feedback",
            param="inference_id",
        )
    row = Feedback(
        feedback_id=feedback_id,
        group_id=group.group_id,
        metric=PREFERENCE_METRIC,
        source=pick.source,
        rater_id=pick.rater_id or group.rater_id,
        created_at=now,
        label=_label(pick),
        text=pick.reason,
        shown_order=_shown_order(pick.shown_order),
        latency_ms=pick.latency_ms,
        tags=dict(pick.tags),
    )
    if pick.edited_text is None:
        return (row,)
    return row, _edit_row(row, pick)


def _edit_row(row: Feedback, pick: Pick) -> Feedback:
    """An edited answer is a demonstration: it is preferred to what was served."""
    text = _text(pick.edited_text, "edited_text")
    return replace(
        row,
        feedback_id=row.feedback_id + EDIT_SUFFIX,
        metric=DEMONSTRATION_METRIC,
        label=None,
        choice_index=pick.chosen_index,
        value=text,
        text=None,
        shown_order=(),
    )


def _label(pick: Pick) -> Label:
    for name in ("chosen_index", "rejected_index"):
        index = getattr(pick, name)
        if index is not None and not 0 <= index < COMPARISON:
            raise InvalidRequestError(f"{name} is {index}, but the group has answers 0 and 1", param=name)
    outcome = pick.outcome or (Outcome.CHOSEN if pick.chosen_index is not None else None)
    if outcome is None:
        raise InvalidRequestError("say the outcome: chosen (with chosen_index), tie, both_bad or skip", param="outcome")
    if outcome is not Outcome.CHOSEN:
        named = (
            "chosen_index" if pick.chosen_index is not None else "rejected_index" if pick.rejected_index is not None else None
        )
        if named is not None:
            raise InvalidRequestError(f"outcome {outcome.value!r} chooses nothing, so {named} must be left out", param=named)
        return _LABELS[outcome]
    if pick.chosen_index is None:
        raise InvalidRequestError("outcome 'chosen' needs chosen_index", param="chosen_index")
    if pick.rejected_index == pick.chosen_index:
        raise InvalidRequestError("rejected_index is the chosen one; a pick rejects the other answer", param="rejected_index")
    return (Label.A, Label.B)[pick.chosen_index]


def _shown_order(order: tuple[int, ...]) -> tuple[int, ...]:
    if order and sorted(order) != list(range(COMPARISON)):
        raise InvalidRequestError(
            "shown_order lists each index once, from left to right: [0, 1] or [1, 0]", param="shown_order"
        )
    return order


def _value_row(group: Group, value: MetricValue, feedback_id: str, now: datetime) -> Feedback:
    return Feedback(
        feedback_id=feedback_id,
        group_id=group.group_id,
        metric=value.metric,
        source=value.source,
        rater_id=value.rater_id or group.rater_id,
        created_at=now,
        choice_index=_choice(group, value),
        value=_checked(value.metric, value.value),
        text=value.comment,
        tags=dict(value.tags),
    )


def _choice(group: Group, value: MetricValue) -> int | None:
    """The completion that is meant; a demonstration or comment may be about the whole group."""
    n = len(group.completions)
    if value.choice_index is not None:
        if not 0 <= value.choice_index < n:
            last = f"answers 0 to {n - 1}" if n > 1 else "only answer 0"
            raise InvalidRequestError(f"choice_index is {value.choice_index}, but the group has {last}", param="choice_index")
        return value.choice_index
    if n == 1:
        return 0
    if value.metric in (COMMENT_METRIC, DEMONSTRATION_METRIC):
        return None
    raise InvalidRequestError(f"the group has {n} answers; choice_index says which one is meant", param="choice_index")


def _checked(metric: str, value: bool | float | str) -> bool | float | str:
    """The value, if it is of its metric's kind."""
    if metric == PREFERENCE_METRIC:
        raise InvalidRequestError("picks between two answers go to /v1/preferences", param="metric_name")
    if metric == THUMBS_METRIC and not isinstance(value, bool):
        raise InvalidRequestError("thumbs is true or false", param="value")
    if metric == SCORE_METRIC and (isinstance(value, bool | str)):
        raise InvalidRequestError("score is a number", param="value")
    if metric in (COMMENT_METRIC, DEMONSTRATION_METRIC):
        return _text(value, "value")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequestError("value must be a finite number", param="value")
    return value


def _text(value: object, param: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(f"{param} must be text that is not blank", param=param)
    return value
