"""Groups that somebody picked from, for the operator: decisions about one or many of them, their export, and saved views."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import StreamingResponse

from pairloop.client.shapes import Page
from pairloop.errors import InvalidRequestError
from pairloop.formats.writer import FORMATS
from pairloop.loop import curate
from pairloop.loop.curate import Decided, Decision, Selection
from pairloop.loop.pairs import Dropped
from pairloop.store import new_id, preferences, saved_views
from pairloop.store.marks import Mark
from pairloop.store.preferences import State, Wanted
from pairloop.store.saved_views import SavedView
from pairloop.types import GroupKind, Label, Pool, Source
from pairloop.web.audit import Actor
from pairloop.web.context import Context, Here
from pairloop.web.wire import MAX_INT32, Body, PlainText, Text512

router = APIRouter(tags=["groups"])

JSONL = "application/jsonl"
MAX_IDS = 1_000


class Filters(BaseModel):
    """Which groups with feedback; what is left out or empty does not matter. All that is asked of a vote is asked of one."""

    model_config = ConfigDict(extra="forbid")

    q: PlainText | None = Field(
        None, max_length=200, description='All these words in the prompt or an answer; or "quoted" ones.'
    )
    label: Label | None = Field(None, description="A vote said so, and was not revised.")
    source: Source | None = None
    metric: PlainText | None = Field(None, max_length=64, description="A vote of this kind: preference, thumbs, score …")
    rater: PlainText | None = Field(None, max_length=512)
    reason: Dropped | None = Field(None, description="A vote was left out of the last dataset that looked at it, for this.")
    kind: GroupKind | None = None
    pool: Pool | None = None
    version: int | None = Field(None, ge=0, le=MAX_INT32, description="An answer is of this version.")
    state: State | None = Field(None, description="What became of it.")
    since: date | None = Field(None, description="The newest vote is of this day (UTC) or later.")
    until: date | None = Field(None, description="The newest vote is of this day (UTC) or earlier.")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        """A form sends its empty fields."""
        return {name: value for name, value in given.items() if value != ""} if isinstance(given, dict) else given

    @property
    def wanted(self) -> Wanted:
        return Wanted(
            search=self.q,
            label=self.label,
            source=self.source,
            metric=self.metric,
            rater=self.rater,
            reason=self.reason,
            kind=self.kind,
            pool=self.pool,
            version=self.version,
            state=self.state,
            since=_midnight(self.since),
            until=None if self.until is None else _midnight(min(self.until, date.max - timedelta(days=1)) + timedelta(days=1)),
        )

    @property
    def texts(self) -> dict[str, str]:
        """Those that are set, as they stand in an address."""
        given = self.model_dump(mode="json", exclude_none=True)
        return {name: str(value) for name, value in given.items() if name in Filters.model_fields}


class SelectionRequest(Body):
    """Groups by ``ids``, or exactly those that ``filters`` find; with ``dryrun`` it only says how many that are."""

    ids: list[Annotated[str, Field(max_length=255)]] | None = Field(None, min_length=1, max_length=MAX_IDS)
    filters: Annotated[Filters, Field(strict=False)] | None = None
    reason: Text512 = Field(min_length=1, examples=["the customer had misread the question"])
    dryrun: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> SelectionRequest:
        if (self.ids is None) == (self.filters is None):
            raise ValueError("give either ids or filters")
        return self

    @property
    def selection(self) -> Selection:
        if self.filters is not None:
            return Selection(wanted=self.filters.wanted)
        return Selection(tuple(self.ids or ()))


class RelabelRequest(SelectionRequest):
    """What the votes are to say from now on; ``label`` A is the first answer."""

    label: Annotated[Label, Field(strict=False)]


class DecidedResource(BaseModel):
    """``selected`` groups were meant, on ``changed`` of them the decision changed something (or would)."""

    object: Literal["groups.decided"] = "groups.decided"
    selected: int
    changed: int
    dryrun: bool


class ViewBody(Body):
    """A set of filters to be kept under a name."""

    name: PlainText = Field(min_length=1, max_length=64, examples=["ties of last week"])
    filters: Annotated[Filters, Field(strict=False)]


class ViewResource(BaseModel):
    object: Literal["saved_view"] = "saved_view"
    id: str
    name: str
    filters: dict[str, str]
    created_at: int


class Export(Filters):
    """Filters, and the format of the lines."""

    format: str = Field("comparisons", max_length=64, description="A format of `pairloop data export`.")


@router.get(
    "/v1/groups/export",
    summary="What filters find, as JSONL that `pairloop data import` reads",
    response_class=StreamingResponse,
)
def export_groups(query: Annotated[Export, Query()], context: Here) -> StreamingResponse:
    """Newest vote first, as it is now: votes that come meanwhile are not in it. `x-pairloop-groups` says how many groups were
    found; one whose votes the format cannot hold is left out."""
    store, policy = context.store, context.policy_name
    if query.format not in FORMATS:
        raise InvalidRequestError(f"no format {query.format!r}; there are {', '.join(FORMATS)}", param="format")
    with store.reading() as c:
        begin = preferences.first(c, policy)
        found = sum(map(len, preferences.each(c, policy, query.wanted, begin)))
    lines = curate.export(store, context.config, query.wanted, begin, query.format)
    headers = {"content-disposition": f'attachment; filename="{policy}-{query.format}.jsonl"', "x-pairloop-groups": str(found)}
    return StreamingResponse(_together(lines), media_type=JSONL, headers=headers)


@router.post("/v1/groups/exclude", summary="Keep groups, and train on them no more, with a reason")
def exclude(body: SelectionRequest, context: Here, actor: Actor) -> DecidedResource:
    return _mark(context, body, actor, Mark.EXCLUDED, is_set=True)


@router.post("/v1/groups/include", summary="Train on excluded groups again, with a reason")
def include(body: SelectionRequest, context: Here, actor: Actor) -> DecidedResource:
    return _mark(context, body, actor, Mark.EXCLUDED, is_set=False)


@router.post("/v1/groups/enqueue", summary="Show groups to raters again, first in the labelling queue, with a reason")
def enqueue(body: SelectionRequest, context: Here, actor: Actor) -> DecidedResource:
    return _mark(context, body, actor, Mark.QUEUED, is_set=True)


@router.post("/v1/groups/dequeue", summary="Take groups out of the labelling queue again, with a reason")
def dequeue(body: SelectionRequest, context: Here, actor: Actor) -> DecidedResource:
    return _mark(context, body, actor, Mark.QUEUED, is_set=False)


@router.post("/v1/groups/relabel", summary="Let the votes about groups say something else; what their raters said stays")
def relabel(body: RelabelRequest, context: Here, actor: Actor) -> DecidedResource:
    """Each person's vote that says otherwise gets a later revision; where nobody picked it is a vote of your own."""
    decision = Decision(actor, body.reason, body.dryrun)
    return _decided(context, curate.relabel(context.store, context.config, body.selection, body.label, decision), body)


@router.get("/v1/views", summary="Saved views of the preferences, by name")
def list_views(context: Here) -> Page[ViewResource]:
    with context.store.reading() as c:
        found = [_view(view) for view in saved_views.list_(c, context.policy_name)]
    ends = (found[0].id, found[-1].id) if found else (None, None)
    return Page(data=found, first_id=ends[0], last_id=ends[1], has_more=False)


@router.post("/v1/views", status_code=201, summary="Keep a set of filters under a name")
def create_view(body: ViewBody, context: Here) -> ViewResource:
    if not body.filters.texts:
        raise InvalidRequestError("a view of everything needs no name; set a filter first", param="filters")
    view = SavedView(new_id("view"), context.store.kept_words(body.name), _kept(context, body.filters), datetime.now(UTC))
    context.store.write(lambda c: saved_views.insert(c, context.policy_name, view))
    return _view(view)


@router.delete("/v1/views/{view_id}", summary="Forget a saved view")
def delete_view(view_id: str, context: Here) -> dict[str, Any]:
    context.store.write(lambda c: saved_views.delete(c, context.policy_name, view_id))
    return {"id": view_id, "object": "saved_view", "deleted": True}


def _kept(context: Context, filters: Filters) -> dict[str, str]:
    """The filters as they are stored: they find what is stored, where nobody's address is."""
    redactor, texts = context.store.redactor, filters.texts
    typed = {name: text for name, text in texts.items() if name in ("q", "rater")}
    return texts if redactor is None else {**texts, **redactor.values(typed, ids=("rater",))}


def _mark(context: Context, body: SelectionRequest, actor: str, kind: Mark, *, is_set: bool) -> DecidedResource:
    decision = Decision(actor, body.reason, body.dryrun)
    done = curate.mark(context.store, context.config, body.selection, kind, decision, is_set=is_set)
    return _decided(context, done, body)


def _decided(context: Context, done: Decided, body: SelectionRequest) -> DecidedResource:
    if not body.dryrun:
        context.notify()
    return DecidedResource(selected=done.selected, changed=done.changed, dryrun=body.dryrun)


def _view(view: SavedView) -> ViewResource:
    created_at = int(view.created_at.timestamp())
    return ViewResource(id=view.view_id, name=view.name, filters=dict(view.filters), created_at=created_at)


def _together(lines: Iterator[str], at_once: int = 64) -> Iterator[str]:
    """Lines by the handful: each part crosses from a worker thread to the server's."""
    part: list[str] = []
    for line in lines:
        part.append(line)
        if len(part) == at_once:
            yield "".join(part)
            part = []
    yield "".join(part)


def _midnight(day: date | None) -> datetime | None:
    return None if day is None else datetime.combine(day, time(), UTC)
