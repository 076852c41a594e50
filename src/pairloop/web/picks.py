"""Feedback over HTTP: picks between two answers, and values about one of them."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import Field, StringConstraints

from pairloop.loop.feedback import MetricValue, Outcome, Pick, Recorded, submit_metric, submit_preference
from pairloop.types import Label, Source
from pairloop.web.chat import version_name
from pairloop.web.context import Here
from pairloop.web.replies import JSON
from pairloop.web.wire import MAX_INT32, Body, Metadata

router = APIRouter(tags=["feedback"])

Id = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$")]
LongText = Annotated[str, StringConstraints(max_length=200_000)]
SourceName = Literal["human", "code", "llm"]
Rater = Annotated[str, StringConstraints(min_length=1, max_length=512)]

WELL_KNOWN_METRICS = frozenset({"thumbs", "score", "comment", "demonstration"})


class PreferenceBody(Body):
    """A pick between the two answers of one chat completion."""

    id: Id | None = None
    inference_id: str = Field(max_length=128)
    outcome: Literal["chosen", "tie", "both_bad", "skip"] | None = None
    chosen_index: int | None = None
    rejected_index: int | None = None
    shown_order: list[int] | None = Field(default=None, max_length=2)
    reason: LongText | None = None
    edited_text: LongText | None = None
    rater_id: Rater | None = None
    latency_ms: int | None = Field(default=None, ge=0, le=MAX_INT32)
    source: SourceName | None = None
    tags: Metadata | None = None
    dryrun: bool = False

    def as_pick(self) -> Pick:
        return Pick(
            inference_id=self.inference_id,
            outcome=Outcome(self.outcome) if self.outcome else None,
            chosen_index=self.chosen_index,
            rejected_index=self.rejected_index,
            shown_order=tuple(self.shown_order or ()),
            reason=self.reason,
            edited_text=self.edited_text,
            rater_id=self.rater_id,
            latency_ms=self.latency_ms,
            source=Source(self.source or "human"),
            tags=self.tags or {},
            feedback_id=self.id,
        )


class FeedbackBody(Body):
    """A value about one completion: thumbs (bool), score (number), comment or demonstration (text), or your own metric."""

    id: Id | None = None
    inference_id: str = Field(max_length=128)
    choice_index: int | None = None
    metric_name: MetricName
    value: bool | float | LongText
    comment: LongText | None = None
    source: SourceName | None = None
    source_id: Rater | None = None
    tags: Metadata | None = None
    dryrun: bool = False

    def as_value(self) -> MetricValue:
        return MetricValue(
            inference_id=self.inference_id,
            metric=self.metric_name,
            value=self.value,
            choice_index=self.choice_index,
            comment=self.comment,
            rater_id=self.source_id,
            source=Source(self.source or "human"),
            tags=self.tags or {},
            feedback_id=self.id,
        )


@router.post(
    "/v1/preferences",
    status_code=201,
    summary="Record a pick between two answers; durable before the 201, a replay changes nothing",
    response_model=None,
)
async def preferences(body: PreferenceBody, context: Here) -> Response:
    recorded = await asyncio.wrap_future(submit_preference(context.store, body.as_pick(), dryrun=body.dryrun))
    if not (recorded.duplicate or recorded.dryrun):
        context.notify()
        context.metrics.picks.labels(str(recorded.feedback.label or Label.SKIP)).inc()
    return _reply(recorded)


@router.post("/v1/feedback", status_code=201, summary="Record a value about one completion", response_model=None)
async def feedback(body: FeedbackBody, context: Here) -> Response:
    recorded = await asyncio.wrap_future(submit_metric(context.store, body.as_value(), dryrun=body.dryrun))
    if not (recorded.duplicate or recorded.dryrun):
        context.notify()
        metric = recorded.feedback.metric
        context.metrics.values.labels(metric if metric in WELL_KNOWN_METRICS else "other").inc()
    return _reply(recorded)


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
    status = 200 if recorded.duplicate or recorded.dryrun else 201
    return Response(json.dumps(body), status_code=status, media_type=JSON)
