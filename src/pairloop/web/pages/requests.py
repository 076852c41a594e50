"""Requests: what was asked and answered, what was said about it and became of it; and what another version would have said."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import Connection

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.loop.feedback import is_revealed
from pairloop.store import datasets, feedback, groups, outcomes, provenance, removed, requests, set_aside, versions
from pairloop.store.requests import RequestFilter
from pairloop.types import (
    PREFERENCE_METRIC,
    Completion,
    Feedback,
    Group,
    GroupKind,
    LabelledGroup,
    Message,
    Pool,
    offered_tools,
    spoken,
)
from pairloop.web.context import Context, Here
from pairloop.web.pages.became import why_in_none
from pairloop.web.pages.rendering import PageRoute, page
from pairloop.web.pages.searching import Found, going_on, rendered

ON_A_PAGE = 30
PREVIEW = 160
FILTERS = ("version", "pool", "kind", "feedback", "user", "rater", "since", "until", "slower")

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@dataclass(frozen=True, slots=True)
class Line:
    """A request in the list. ``versions``: who answered, empty where that is not told yet; ``took``: the slowest answer."""

    group: Group
    asked: str
    versions: str
    tokens: int
    took: Took
    said: str


class Took(NamedTuple):
    """Milliseconds of an answer, as words with why one is not known."""

    first: str
    total: str
    why: str


@dataclass(frozen=True, slots=True)
class Detail:
    """One request. ``took``: the slowest answer; ``sides``: each, empty while telling them apart would tell who gave which.

    ``why_in_none``: where no dataset holds it. ``others``: versions to replay it on; ``gone``: why there is nothing to replay.
    """

    group: Group
    turns: Sequence[Message]
    tools: int
    revealed: bool
    took: Took
    sides: Sequence[Took]
    said: Sequence[Feedback]
    shadow: Group | None
    trained: Sequence[tuple[str, Sequence[str]]]
    why_in_none: str
    others: Sequence[str]
    gone: str | None


class Asked(BaseModel):
    """The page's address. ``since`` and ``until``: days, in UTC; ``slower``: than so many ms; ``after``: the last request of
    the page before."""

    version: str = Field("", max_length=16)
    pool: Literal["", "train", "gate"] = ""
    kind: Literal["", "train", "heldout", "duel", "imported", "shadow"] = ""
    feedback: Literal["", "with", "without"] = ""
    user: str = Field("", max_length=512)
    rater: str = Field("", max_length=512)
    since: str = Field("", max_length=10)
    until: str = Field("", max_length=10)
    slower: str = Field("", max_length=16)
    after: str | None = Field(None, max_length=255)

    @property
    def wanted(self) -> RequestFilter:
        return RequestFilter(
            version=_number(self.version),
            pool=Pool(self.pool) if self.pool else None,
            kind=GroupKind(self.kind) if self.kind else None,
            user=self.user or None,
            rater=self.rater or None,
            has_feedback=None if not self.feedback else self.feedback == "with",
            since=_day(self.since, "since"),
            until=None if not self.until else _next_day(self.until),
            slower_ms=_milliseconds(self.slower),
        )

    @property
    def given(self) -> dict[str, str]:
        """The filters that are set."""
        return {name: value for name in FILTERS if (value := getattr(self, name))}


class Searched(Asked):
    """The address of a page whose search goes on, behind the request ``at``: what is asked there, and its lines so far."""

    at: str = Field(max_length=255)
    shown: int = Field(0, ge=0, le=ON_A_PAGE)


@router.get("/requests")
async def request_list(request: Request, context: Here, query: Annotated[Asked, Query()]) -> Response:
    wanted, given = query.wanted, query.given

    def read() -> tuple[list[Line], requests.Found]:
        with context.store.reading() as c:
            found = requests.page(c, context.policy_name, wanted, after=query.after, limit=ON_A_PAGE)
            return [_line(c, one) for one in found.requests], found

    lines, found = await asyncio.to_thread(read)
    here = given | ({"after": query.after} if query.after else {})
    values = _shown(query, lines, found.after, found.looked, has_lines=bool(lines), is_cut=found.is_cut)
    values |= {
        "asked": {**dict.fromkeys(FILTERS, ""), **given},
        "search": urlencode({**here, "at": found.after, "shown": len(lines)}) if found.is_cut else None,
    }
    return page(request, context, "requests.html", title="Requests", **values)


@router.get("/requests/search")
async def search(request: Request, context: Here, query: Annotated[Searched, Query()]) -> Response:
    """Server-sent events: what each further look adds to the page, until it is full."""
    wanted, policy, room = query.wanted, context.policy_name, ON_A_PAGE - query.shown

    def steps() -> Iterator[Found]:
        left = room
        for step in requests.through_all(context.store, policy, wanted, after=query.at, room=room):
            left -= len(step.new)
            with context.store.reading() as c:
                lines = [_line(c, one) for one in step.new]
            values = _shown(query, lines, step.after, step.looked, has_lines=left < ON_A_PAGE, is_cut=step.is_cut)
            parts = {"searched": "_requests_searched.html", "requests-foot": "_requests_foot.html"}
            yield rendered("_requests_rows.html", parts, values | {"there_are": step.there_are, "found": ON_A_PAGE - left})

    return going_on(request, context, steps())


def _shown(
    query: Asked, lines: Sequence[Line], after: str | None, looked: int, *, has_lines: bool, is_cut: bool
) -> dict[str, Any]:
    """What the page and each step of its search are both rendered from."""
    given = query.given
    return {
        "lines": lines,
        "has_lines": has_lines,
        "is_filtered": bool(given),
        "query": urlencode(given),
        "more": None if after is None else urlencode({**given, "after": after}),
        "after": query.after,
        "is_cut": is_cut,
        "looked": looked,
    }


@router.get("/requests/{group_id}")
async def request_page(request: Request, context: Here, group_id: str) -> Response:
    found = await asyncio.to_thread(_detail, context, group_id)
    return page(request, context, "request.html", title="Request", found=found, preference=PREFERENCE_METRIC)


def _line(c: Connection, one: LabelledGroup) -> Line:
    group = one.group
    told = {answer.version for answer in group.completions} if is_revealed(c, group) else set()
    names = ", ".join(f"@{number}" for number in sorted(number for number in told if number is not None))
    tokens = len(group.prompt_token_ids) + sum(len(answer.token_ids) for answer in group.completions)
    return Line(group, _preview(group), names, tokens, _took(group.completions), _summary(one.feedback))


def _took(answers: Sequence[Completion]) -> Took:
    """How long these answers took: until there was something to see, and until the slowest was whole."""
    totals = [one.total_ms for one in answers if one.total_ms is not None]
    firsts = [one.first_token_ms for one in answers if one.first_token_ms is not None]
    if not totals:
        return Took("–", "–", "not known: it was imported, or answered before times were kept")
    why = "" if firsts else "not streamed: there was nothing to see before the whole answer"
    return Took(_seconds(min(firsts)) if firsts else "–", _seconds(max(totals)), why)


def _seconds(ms: int) -> str:
    return f"{ms} ms" if ms < 1_000 else f"{ms / 1000:,.1f} s"


def _preview(group: Group) -> str:
    """The last thing that was asked, cut short."""
    if isinstance(group.prompt, str):
        text = group.prompt
    else:
        text = next((turn.content for turn in reversed(group.prompt) if turn.role == "user"), "")
    return text[:PREVIEW]


def _summary(rows: Sequence[Feedback]) -> str:
    """What counts, in few words."""
    picks = [row.label.value.replace("_", " ").lower() for row in rows if row.metric == PREFERENCE_METRIC and row.label]
    words = [f"{one.upper() if len(one) == 1 else one}" for one in dict.fromkeys(picks)]
    others = dict.fromkeys(row.metric for row in rows if row.metric != PREFERENCE_METRIC)
    return ", ".join([*words, *others])


def _detail(context: Context, group_id: str) -> Detail:
    with context.store.reading() as c:
        group = groups.get(c, group_id)
        if group is None or group.policy != context.policy_name:
            raise NotFoundError(f"no request {group_id!r}", param="group_id")
        revealed = is_revealed(c, group)
        held = provenance.containing_group(c, group_id)
        made = provenance.trained_on(c, held)
        said = feedback.history(c, group_id)
        known = [one for one in versions.list_(c, context.policy_name) if not removed.is_removed(c, one.path)]
        return Detail(
            group=group,
            turns=(Message("prompt", group.prompt),) if isinstance(group.prompt, str) else spoken(group.prompt),
            tools=len(offered_tools(group.prompt)),
            revealed=revealed,
            took=_took(group.completions),
            sides=[_took((one,)) for one in group.completions] if revealed else [],
            said=said,
            shadow=groups.get(c, groups.shadow_id(group_id)) if revealed else None,
            trained=[(one, made.get(one, ())) for one in held if datasets.get(c, one) is not None],
            why_in_none=_why_in_none(c, group, said),
            others=[one.name for one in reversed(known)],
            gone=None if group.prompt else "What was asked was erased: there is nothing to ask again.",
        )


def _why_in_none(c: Connection, group: Group, said: Sequence[Feedback]) -> str:
    outcome = outcomes.outcomes(c, group.policy, [group.group_id])[group.group_id]
    reasons = set_aside.reasons(c, [row.feedback_id for row in feedback.latest_revisions(said)])
    return why_in_none(group, outcome, [reason for reason, _ in reasons.values()], has_votes=bool(said))


def _number(version: str) -> int | None:
    if not version:
        return None
    digits = version.rpartition("@")[2]
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9):
        raise InvalidRequestError(f"version {version!r} is no number of a version, such as 3", param="version")
    return int(digits)


def _milliseconds(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidRequestError(f"slower {text!r} is no whole number of milliseconds, such as 1500", param="slower")
    return int(text)


def _day(text: str, param: str) -> datetime | None:
    if not text:
        return None
    try:
        return datetime.combine(date.fromisoformat(text), time(), UTC)
    except ValueError:
        raise InvalidRequestError(f"{param} {text!r} is no day such as 2026-05-31", param=param) from None


def _next_day(text: str) -> datetime | None:
    day = _day(text, "until")
    try:
        return None if day is None else day + timedelta(days=1)
    except OverflowError:
        return None  # the last day that there is
