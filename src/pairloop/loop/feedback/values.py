"""Values about one completion: thumbs, score, comment, demonstration, or a metric of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pairloop.errors import InvalidRequestError
from pairloop.loop.feedback.record import Draft, Recorded, checked_text, submit, waited_for
from pairloop.store import Store
from pairloop.store.heads import GroupHead
from pairloop.store.ids import new_id
from pairloop.types import (
    COMMENT_METRIC,
    DEMONSTRATION_METRIC,
    ERROR_METRIC,
    GOLD_METRIC,
    PREFERENCE_METRIC,
    REPEAT_METRIC,
    SCORE_METRIC,
    THUMBS_METRIC,
    Feedback,
    Source,
)


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


def record_metric(
    store: Store, value: MetricValue, *, notify: Callable[[], None] | None = None, dryrun: bool = False
) -> Recorded:
    """Write a value durably; replays and errors as in ``record_preference``."""
    return waited_for(submit_metric(store, value, dryrun=dryrun), notify)


def submit_metric(store: Store, value: MetricValue, *, dryrun: bool = False) -> Future[Recorded]:
    """``record_metric`` without the wait."""
    feedback_id, now = value.feedback_id or new_id("feedback"), datetime.now(UTC)
    draft = Draft(value.inference_id, lambda group: (_value_row(group, value, feedback_id, now),), value.feedback_id, dryrun)
    return submit(store, draft)


def _value_row(group: GroupHead, value: MetricValue, feedback_id: str, now: datetime) -> Feedback:
    return Feedback(
        feedback_id=feedback_id,
        group_id=group.group_id,
        metric=value.metric,
        source=value.source,
        rater_id=value.rater_id or group.rater_id,
        created_at=now,
        choice_index=_choice(group, value),
        value=checked_value(value.metric, value.value),
        text=value.comment,
        tags=dict(value.tags),
    )


def _choice(group: GroupHead, value: MetricValue) -> int | None:
    """The completion that is meant; a demonstration or comment may be about the whole group."""
    n = len(group.versions)
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


def checked_value(metric: str, value: bool | float | str) -> bool | float | str:
    """The value, if it is of its metric's kind."""
    if metric == PREFERENCE_METRIC:
        raise InvalidRequestError("picks between two answers go to /v1/preferences", param="metric_name")
    if metric == ERROR_METRIC:
        raise InvalidRequestError("a labeller's failure goes to /v1/preferences, with the outcome 'error'", param="metric_name")
    if metric in (GOLD_METRIC, REPEAT_METRIC):
        raise InvalidRequestError(
            f"{metric} is what the labelling queue records; name a metric of your own", param="metric_name"
        )
    if metric == THUMBS_METRIC and not isinstance(value, bool):
        raise InvalidRequestError("thumbs is true or false", param="value")
    if metric == SCORE_METRIC and (isinstance(value, bool | str)):
        raise InvalidRequestError("score is a number", param="value")
    if metric in (COMMENT_METRIC, DEMONSTRATION_METRIC):
        return checked_text(value, "value")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequestError("value must be a finite number", param="value")
    return value
