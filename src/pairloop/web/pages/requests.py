"""Requests: what was asked and answered, what was said about it and became of it; and what another version would have said."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.loop.feedback import is_revealed
from pairloop.store import datasets, feedback, groups, outcomes, provenance, removed, requests, set_aside, versions
from pairloop.store.requests import LOOKED_AT_MOST, RequestFilter
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

ON_A_PAGE = 30
PREVIEW = 160
FILTERS = ("version", "pool", "kind", "feedback", "user", "rater", "since", "until", "slower")

router = APIRouter(include_in_schema=False, route_class=PageRoute)

Text = Annotated[str, Query(max_length=512)]
After = Annotated[str | None, Query(max_length=255)]


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


@router.get("/requests")
async def request_list(
    request: Request,
    context: Here,
    version: Annotated[str, Query(max_length=16)] = "",
    pool: Literal["", "train", "gate"] = "",
    kind: Literal["", "train", "heldout", "duel", "imported", "shadow"] = "",
    feedback: Literal["", "with", "without"] = "",
    user: Text = "",
    rater: Text = "",
    since: Annotated[str, Query(max_length=10)] = "",
    until: Annotated[str, Query(max_length=10)] = "",
    slower: Annotated[str, Query(max_length=16)] = "",
    after: After = None,
) -> Response:
    """``since`` and ``until``: days, in UTC; ``slower``: than so many ms; ``after``: the last request of the page before."""
    wanted = RequestFilter(
        version=_number(version),
        pool=Pool(pool) if pool else None,
        kind=GroupKind(kind) if kind else None,
        user=user or None,
        rater=rater or None,
        has_feedback=None if not feedback else feedback == "with",
        since=_day(since, "since"),
        until=None if not until else _next_day(until),
        slower_ms=_milliseconds(slower),
    )
    asked = {"version": version, "pool": pool, "kind": kind, "feedback": feedback, "user": user, "rater": rater}
    asked = {name: value for name, value in {**asked, "since": since, "until": until, "slower": slower}.items() if value}

    def read() -> tuple[list[Line], requests.Found]:
        with context.store.reading() as c:
            found = requests.page(c, context.policy_name, wanted, after=after, limit=ON_A_PAGE)
            return [_line(c, one) for one in found.requests], found

    lines, found = await asyncio.to_thread(read)
    values: dict[str, Any] = {
        "lines": lines,
        "asked": {**dict.fromkeys(FILTERS, ""), **asked},
        "is_filtered": bool(asked),
        "query": urlencode(asked),
        "more": None if found.after is None else urlencode({**asked, "after": found.after}),
        "after": after,
        "is_cut": found.is_cut,
        "looked": LOOKED_AT_MOST,
    }
    return page(request, context, "requests.html", title="Requests", **values)


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
