"""Feedback over HTTP: picks between two answers, and values about one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Response
from pydantic import Field, StringConstraints, model_validator

from pairloop.loop.feedback import (
    Applied,
    ConversationValue,
    MetricValue,
    Outcome,
    Pick,
    Recorded,
    submit_metric,
    submit_outcome,
    submit_preference,
    submit_repeat,
    submit_reserved,
)
from pairloop.store.waiting import awaitable
from pairloop.telemetry import traces
from pairloop.types import ERROR_METRIC, Feedback
from pairloop.web.callers import AsCaller, Caller, name_of, source_of
from pairloop.web.chat import version_name
from pairloop.web.context import Context, Here
from pairloop.web.replies import JSON
from pairloop.web.short_way import Shortcut
from pairloop.web.wire import MAX_INT32, NO_NUL, Body, Metadata, Text512, field_error

router = APIRouter(tags=["feedback"])

Id = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$")]
LongText = Annotated[str, StringConstraints(max_length=200_000, pattern=NO_NUL)]
SourceName = Literal["human", "code", "llm"]
Rater = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=NO_NUL)]

WELL_KNOWN_METRICS = frozenset({"thumbs", "score", "comment", "demonstration"})


class PreferenceBody(Body):
    """A pick between the two answers of one chat completion."""

    id: Id | None = None
    inference_id: str = Field(max_length=128, pattern=NO_NUL)
    outcome: Literal["chosen", "tie", "both_bad", "skip", "error"] | None = None
    chosen_index: int | None = None
    rejected_index: int | None = None
    shown_order: list[int] | None = Field(default=None, max_length=2)
    reason: LongText | None = None
    edited_text: LongText | None = None
    rater_id: Rater | None = None
    latency_ms: int | None = Field(default=None, ge=0, le=MAX_INT32)
    source: SourceName | None = None
    tags: Metadata | None = None
    repeat: bool = False
    reservation_id: Id | None = None
    dryrun: bool = False

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if self.repeat and self.reservation_id is not None:
            raise field_error("repeat", "a reservation knows whether it is a repeat: leave repeat out")
        return self

    def as_pick(self, caller: Caller | None) -> Pick:
        return Pick(
            inference_id=self.inference_id,
            outcome=Outcome(self.outcome) if self.outcome else None,
            chosen_index=self.chosen_index,
            rejected_index=self.rejected_index,
            shown_order=tuple(self.shown_order or ()),
            reason=self.reason,
            edited_text=self.edited_text,
            rater_id=name_of(caller, self.rater_id, "rater_id"),
            latency_ms=self.latency_ms,
            source=source_of(caller, self.source),
            tags=self.tags or {},
            feedback_id=self.id,
        )


class FeedbackBody(Body):
    """A value about one completion: thumbs (bool), score (number), comment or demonstration (text), or your own metric.

    With `conversation_id` instead of `inference_id`: about all answers of that conversation that were taken.
    """

    id: Id | None = None
    inference_id: str | None = Field(default=None, max_length=128, pattern=NO_NUL)
    conversation_id: Text512 | None = None
    choice_index: int | None = None
    metric_name: MetricName
    value: bool | float | LongText
    comment: LongText | None = None
    source: SourceName | None = None
    source_id: Rater | None = None
    tags: Metadata | None = None
    dryrun: bool = False

    @model_validator(mode="after")
    def _about_one_thing(self) -> Self:
        if (self.inference_id is None) == (self.conversation_id is None):
            raise field_error("inference_id", "name either an inference_id or a conversation_id")
        if self.conversation_id is not None and self.choice_index is not None:
            raise field_error(
                "choice_index", "choice_index goes with inference_id; of a conversation the taken answers are meant"
            )
        return self

    def as_outcome(self, conversation_id: str, caller: Caller | None) -> ConversationValue:
        return ConversationValue(
            conversation_id=conversation_id,
            metric=self.metric_name,
            value=self.value,
            comment=self.comment,
            rater_id=name_of(caller, self.source_id, "source_id"),
            source=source_of(caller, self.source),
            tags=self.tags or {},
            feedback_id=self.id,
        )

    def as_value(self, inference_id: str, caller: Caller | None) -> MetricValue:
        return MetricValue(
            inference_id=inference_id,
            metric=self.metric_name,
            value=self.value,
            choice_index=self.choice_index,
            comment=self.comment,
            rater_id=name_of(caller, self.source_id, "source_id"),
            source=source_of(caller, self.source),
            tags=self.tags or {},
            feedback_id=self.id,
        )


@router.post(
    "/v1/preferences",
    status_code=201,
    summary="Record a pick between two answers; durable before the 201, a replay changes nothing",
    response_model=None,
)
async def preferences(body: PreferenceBody, context: Here, caller: AsCaller) -> Response:
    """A rater's second pick revises the first; in a duel the first one counts, since the reply to it names the versions.

    `edited_text` is an ideal answer of its own beside the pick: it becomes chosen against what was served. The outcome `error`
    says that a judge or verifier failed (`source: llm | code`): it is kept, is no vote, and never a tie. With `repeat` it is
    what the rater says of a comparison shown once more, sides swapped (`GET /v1/queue`): no vote either, it measures flips.
    With `reservation_id` it is what the labelling queue held for the rater (`POST /v1/queue/reservations`): it knows which.
    Who is signed in on the pages picks under their own name; a key names the `rater_id` it speaks for.
    """
    return await _take_preference(body, context, caller)


async def _take_preference(body: PreferenceBody, context: Context, caller: Caller | None) -> Response:
    pick = body.as_pick(caller)
    if body.reservation_id is not None:
        submitted = submit_reserved(context.store, pick, body.reservation_id, dryrun=body.dryrun)
    else:
        submit = submit_repeat if body.repeat else submit_preference
        submitted = submit(context.store, pick, dryrun=body.dryrun)
    recorded = await awaitable(submitted)
    if not (recorded.duplicate or recorded.dryrun):
        context.notify()
        context.metrics.picks.labels(str(recorded.feedback.label or ERROR_METRIC)).inc()
        traces.evaluated(recorded.feedback)
    return _reply(recorded)


@router.post(
    "/v1/feedback",
    status_code=201,
    summary="Record a value about one completion, or about the taken ones of a conversation",
    response_model=None,
)
async def feedback(body: FeedbackBody, context: Here, caller: AsCaller) -> Response:
    """Of a conversation, each answer that it went on from, that was the only one, or that a person picked gets the value.

    The reply lists those under `applied`, and under `undecided` the comparisons of which nobody took an answer. True and false
    of the metrics in `feedback.thumb_metrics` (`resolved`) count as thumbs; other metrics are kept and train nothing.
    """
    return await _take_feedback(body, context, caller)


async def _take_feedback(body: FeedbackBody, context: Context, caller: Caller | None) -> Response:
    if body.conversation_id is not None:
        outcome = body.as_outcome(body.conversation_id, caller)
        applied = await awaitable(submit_outcome(context.store, outcome, dryrun=body.dryrun))
        _count_values(context, applied.rows if not (applied.duplicate or applied.dryrun) else ())
        return _outcome_reply(body.conversation_id, applied)
    value = body.as_value(body.inference_id or "", caller)
    recorded = await awaitable(submit_metric(context.store, value, dryrun=body.dryrun))
    _count_values(context, () if recorded.duplicate or recorded.dryrun else (recorded.feedback,))
    return _reply(recorded)


SHORTCUTS: dict[str, Shortcut[Any]] = {
    one.path: one
    for one in (
        Shortcut("/v1/preferences", PreferenceBody, _take_preference),
        Shortcut("/v1/feedback", FeedbackBody, _take_feedback),
    )
}


def _count_values(context: Context, rows: Sequence[Feedback]) -> None:
    """Tell the scheduler and the metrics of new rows."""
    if rows:
        context.notify()
    for row in rows:
        traces.evaluated(row)
        context.metrics.values.labels(row.metric if row.metric in WELL_KNOWN_METRICS else "other").inc()


def _reply(recorded: Recorded) -> Response:
    """201 for a new row, 200 for a replay or a dry run; the versions by index, unless that would unblind a duel."""
    body: dict[str, Any] = {
        "feedback_id": recorded.feedback.feedback_id,
        "inference_id": recorded.group.group_id,
        "duplicate": recorded.duplicate,
        "revision": recorded.feedback.revision,
    }
    if recorded.dryrun:
        body["dryrun"] = True
    if recorded.versions is not None:
        body["versions"] = [version_name(recorded.group.policy, number) for number in recorded.versions]
    return _written(body, again=recorded.duplicate or recorded.dryrun)


def _outcome_reply(conversation_id: str, applied: Applied) -> Response:
    """Which answers got the value; it names no version."""
    body: dict[str, Any] = {
        "feedback_id": applied.rows[0].feedback_id,
        "conversation_id": conversation_id,
        "duplicate": applied.duplicate,
        "applied": [
            {
                "feedback_id": row.feedback_id,
                "inference_id": row.group_id,
                "choice_index": row.choice_index,
                "revision": row.revision,
            }
            for row in applied.rows
        ],
        "undecided": list(applied.undecided),
    }
    if applied.dryrun:
        body["dryrun"] = True
    return _written(body, again=applied.duplicate or applied.dryrun)


def _written(body: dict[str, Any], *, again: bool) -> Response:
    return Response(json.dumps(body), status_code=200 if again else 201, media_type=JSON)
