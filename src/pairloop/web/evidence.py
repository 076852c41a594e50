"""What became of feedback, for the operator: everything said about an answer, and why a row was set aside."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile, islice
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from pydantic import BaseModel

from pairloop.client.shapes import Page
from pairloop.errors import NotFoundError, StoreError
from pairloop.formats.snapshot import HELDOUT_FILE, TRAIN_FILE
from pairloop.loop.pairs import set_aside_rows
from pairloop.store import datasets, feedback, groups
from pairloop.types import PREFERENCE_METRIC, Feedback
from pairloop.web.context import Here
from pairloop.web.paging import page

router = APIRouter(tags=["feedback"])

Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str | None, Query(max_length=255)]


class FeedbackResource(BaseModel):
    """One row as it was said. `counts` is false once its rater said something else; of a duel's picks the first one counts."""

    object: Literal["feedback"] = "feedback"
    id: str
    inference_id: str
    metric_name: str
    label: str | None
    choice_index: int | None
    value: Any
    text: str | None
    shown_order: list[int]
    rater_id: str
    source: str
    latency_ms: int | None
    tags: dict[str, str]
    revision: int
    counts: bool
    created_at: int


class SetAsideResource(BaseModel):
    """A feedback row that a dataset did not use, and why."""

    object: Literal["feedback.set_aside"] = "feedback.set_aside"
    id: str
    reason: str


@router.get("/v1/feedback", summary="Everything that was said about one inference, in order of arrival, revisions too")
def list_feedback(
    inference_id: Annotated[str, Query(max_length=255)], context: Here, limit: Limit = 100, after: After = None
) -> Page[FeedbackResource]:
    with context.store.reading() as c:
        group = groups.get(c, inference_id)
        if group is None:
            raise NotFoundError(f"no inference {inference_id!r}", param="inference_id")
        rows = feedback.history(c, inference_id)
    counting = _counting(rows, in_duel=group.duel_id is not None)
    if after is not None:
        ids = [row.feedback_id for row in rows]
        if after not in ids:
            raise NotFoundError(f"no feedback {after!r} about {inference_id!r}", param="after")
        rows = rows[ids.index(after) + 1 :]
    return page([_resource(row, counts=row.feedback_id in counting) for row in rows[: limit + 1]], limit=limit)


@router.get("/v1/datasets/{dataset_id}/set_aside", summary="The feedback that a dataset did not use, each row with its reason")
def list_set_aside(dataset_id: str, context: Here, limit: Limit = 100, after: After = None) -> Page[SetAsideResource]:
    with context.store.reading() as c:
        dataset = datasets.current(c, dataset_id)
    if dataset is None:
        raise NotFoundError(f"no dataset {dataset_id!r}, or its rows were removed (privacy.keep_days)", param="dataset_id")
    try:
        rows = set_aside_rows(context.store.artifacts.local(dataset.path))
        if after is not None:
            rows = dropwhile(lambda row: row[0] != after, rows)
            if next(rows, None) is None:
                raise NotFoundError(f"no feedback {after!r} was set aside by {dataset_id}", param="after")
        found = list(islice(rows, limit + 1))
    except OSError as error:
        raise StoreError(f"the folder of {dataset_id} cannot be read: {error}") from error
    return page([SetAsideResource(id=feedback_id, reason=reason) for feedback_id, reason in found], limit=limit)


@router.get(
    "/v1/datasets/{dataset_id}/content",
    summary="A dataset's rows as they were trained on (train), or held out (heldout): JSON lines",
    response_class=FileResponse,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}},
)
def dataset_content(dataset_id: str, context: Here, split: Literal["train", "heldout"] = "train") -> FileResponse:
    """With token ids, log-probs and lineage; `POST /v1/datasets/{dataset_id}/export` writes rows for other trainers.

    What was erased since is not in it: the file is that of what is left of the dataset.
    """
    with context.store.reading() as c:
        dataset = datasets.current(c, dataset_id)
    if dataset is None:
        raise NotFoundError(f"no dataset {dataset_id!r}, or its rows were removed (privacy.keep_days)", param="dataset_id")
    path = context.store.artifacts.local(dataset.path) / (TRAIN_FILE if split == "train" else HELDOUT_FILE)
    if not path.is_file():
        raise StoreError(f"the folder of {dataset.dataset_id} has no {path.name}; `pairloop doctor` tells what is missing")
    return FileResponse(path, media_type="application/jsonl", filename=f"{dataset.dataset_id}-{path.name}")


def _counting(rows: Sequence[Feedback], *, in_duel: bool) -> set[str]:
    """The ids of what counts: each rater's latest word; of a duel's picks the very first, which was made blind."""
    counted = feedback.latest_revisions(rows)
    if in_duel:
        picks = [row for row in rows if row.metric == PREFERENCE_METRIC]
        first = min(picks, key=lambda row: (row.created_at, row.feedback_id), default=None)
        counted = [row for row in counted if row.metric != PREFERENCE_METRIC] + ([first] if first is not None else [])
    return {row.feedback_id for row in counted}


def _resource(row: Feedback, *, counts: bool) -> FeedbackResource:
    return FeedbackResource(
        id=row.feedback_id,
        inference_id=row.group_id,
        metric_name=row.metric,
        label=None if row.label is None else row.label.value,
        choice_index=row.choice_index,
        value=row.value,
        text=row.text,
        shown_order=list(row.shown_order),
        rater_id=row.rater_id,
        source=row.source.value,
        latency_ms=row.latency_ms,
        tags=dict(row.tags),
        revision=row.revision,
        counts=counts,
        created_at=int(row.created_at.timestamp()),
    )
