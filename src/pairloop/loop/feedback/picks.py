"""Picks between the two answers of a group, with a reason or an edited answer; and a labeller's report that it failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum

from pairloop.errors import InvalidRequestError
from pairloop.loop.feedback.record import EDIT_SUFFIX, Draft, Recorded, checked_text, submit, waited_for
from pairloop.store import Store
from pairloop.store.heads import GroupHead
from pairloop.store.ids import new_id
from pairloop.types import DEMONSTRATION_METRIC, ERROR_METRIC, PREFERENCE_METRIC, Feedback, Label, Source

COMPARISON = 2


class Outcome(StrEnum):
    """What a pick says in the words of the wire; CHOSEN becomes label A or B by the chosen index.

    ERROR is no pick: a verifier or judge failed. It is kept beside the picks, revises none, and is never a tie.
    """

    CHOSEN = "chosen"
    TIE = "tie"
    BOTH_BAD = "both_bad"
    SKIP = "skip"
    ERROR = "error"


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


def record_preference(store: Store, pick: Pick, *, notify: Callable[[], None] | None = None, dryrun: bool = False) -> Recorded:
    """Write a pick durably. A replay (same id, same body) changes nothing and says ``duplicate``.

    Raises NotFoundError (unknown group), ConflictError (abandoned group, or the id with another body), InvalidRequestError.
    """
    return waited_for(submit_preference(store, pick, dryrun=dryrun), notify)


def submit_preference(store: Store, pick: Pick, *, dryrun: bool = False) -> Future[Recorded]:
    """``record_preference`` without the wait; the future resolves after the fsynced commit."""
    feedback_id, now = pick.feedback_id or new_id("feedback"), datetime.now(UTC)
    draft = Draft(pick.inference_id, lambda group: pick_rows(group, pick, feedback_id, now), pick.feedback_id, dryrun)
    return submit(store, draft)


def pick_rows(group: GroupHead, pick: Pick, feedback_id: str, now: datetime) -> tuple[Feedback, ...]:
    """The pick's row, and that of its edited answer where it has one. InvalidRequestError where it says nothing clear."""
    n = len(group.versions)
    if n != COMPARISON:
        raise InvalidRequestError(
            f"a pick is between two answers and {group.group_id} has {n}; send values about one of them to /v1/feedback",
            param="inference_id",
        )
    label = _label(pick)
    row = Feedback(
        feedback_id=feedback_id,
        group_id=group.group_id,
        metric=PREFERENCE_METRIC if label is not None else ERROR_METRIC,
        source=pick.source,
        rater_id=pick.rater_id or group.rater_id,
        created_at=now,
        label=label,
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
    text = checked_text(pick.edited_text, "edited_text")
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


def _label(pick: Pick) -> Label | None:
    """What the pick says; None where it says that its labeller failed."""
    for name in ("chosen_index", "rejected_index"):
        index = getattr(pick, name)
        if index is not None and not 0 <= index < COMPARISON:
            raise InvalidRequestError(f"{name} is {index}, but the group has answers 0 and 1", param=name)
    outcome = pick.outcome or (Outcome.CHOSEN if pick.chosen_index is not None else None)
    if outcome is None:
        raise InvalidRequestError(
            "say the outcome: chosen (with chosen_index), tie, both_bad, skip, or error where a judge failed", param="outcome"
        )
    if outcome is Outcome.ERROR and pick.source is Source.HUMAN:
        raise InvalidRequestError("outcome 'error' is a labeller's: source is code or llm; people skip", param="outcome")
    if outcome is Outcome.ERROR and pick.edited_text is not None:
        raise InvalidRequestError("outcome 'error' has no edited_text", param="edited_text")
    if outcome is not Outcome.CHOSEN:
        named = (
            "chosen_index" if pick.chosen_index is not None else "rejected_index" if pick.rejected_index is not None else None
        )
        if named is not None:
            raise InvalidRequestError(f"outcome {outcome.value!r} chooses nothing, so {named} must be left out", param=named)
        return _LABELS.get(outcome)
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
