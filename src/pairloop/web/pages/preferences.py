"""Preferences: what people said, by filters; one pair with everything about it; and how many get through to training."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.formats.writer import FORMATS
from pairloop.loop.feedback import is_revealed
from pairloop.store import datasets, feedback, groups, marks, outcomes, preferences, saved_views, searches, set_aside
from pairloop.store.preferences import Counted, Place, State
from pairloop.types import Group, GroupKind, Label, Pool, Source
from pairloop.web.context import Context, Here
from pairloop.web.groups import Filters
from pairloop.web.pages.became import why_in_none
from pairloop.web.pages.preference_lines import STATE_WORDS, Line, chosen_of, facets_of, letter_of, lines_of, said
from pairloop.web.pages.rendering import PageRoute, page, render
from pairloop.web.pages.searching import Found, going_on, rendered
from pairloop.web.words import WHY, Piece, diff

router = APIRouter(include_in_schema=False, route_class=PageRoute)

PAGE = 50
SHOWN = 20_000
"""Characters of a text that a pair's page shows."""
SHOWN_VOTES = 500
FUNNEL_DAYS = 30

CHOICES: Mapping[str, tuple[str, ...]] = {
    "state": tuple(State),
    "label": tuple(Label),
    "pool": tuple(Pool),
    "kind": tuple(kind for kind in GroupKind if kind is not GroupKind.SHADOW),
    "source": tuple(Source),
    "reason": tuple(WHY),
}
FOOT = "found-foot"
PARTS: Mapping[str, str] = {
    "found-head": "_found_head.html",
    "found-facets": "_found_facets.html",
    "searched": "_searched.html",
    FOOT: "_found_foot.html",
}
"""Elements of the page that a search writes anew with each step, and their templates."""
_PLACE = re.compile(r"(\d{1,18})-(\d{1,18})")


class Asked(Filters):
    """The page's address: filters, and where in the listing."""

    after: str | None = Field(None, max_length=40)
    limit: int = Field(PAGE, ge=1, le=100)


class Searched(Asked):
    """The address of a page whose search goes on: what is asked there, at which place, and how many lines it shows already."""

    at: str = Field(max_length=40)
    shown: int = Field(0, ge=0, le=100)


@router.get("/preferences")
async def list_preferences(request: Request, context: Here, query: Annotated[Asked, Query()]) -> Response:
    values = await asyncio.to_thread(_listing, context, query)
    return page(request, context, "preferences.html", title="Preferences", **values)


@router.get("/preferences/search")
async def search(request: Request, context: Here, query: Annotated[Searched, Query()]) -> Response:
    """Server-sent events: what each window of groups adds to the page, until it is full and all are counted."""
    _place(query.at, "at")
    return going_on(request, context, _steps(context, query))


@router.get("/preferences/funnel")
async def funnel(context: Here, since: date | None = None, until: date | None = None) -> Response:
    """The funnel alone; the page fetches it when the table stands."""
    last = until or datetime.now(UTC).date()
    begin = since or max(date.min + timedelta(days=FUNNEL_DAYS), last) - timedelta(days=FUNNEL_DAYS)
    if begin > last:
        raise InvalidRequestError("since is a day after until", param="since")

    def read() -> outcomes.Funnel:
        end = datetime.combine(min(last, date.max - timedelta(days=1)) + timedelta(days=1), time(), UTC)
        with context.store.reading() as c:
            return outcomes.funnel(c, context.policy_name, datetime.combine(begin, time(), UTC), end)

    counted = await asyncio.to_thread(read)
    return render("_funnel.html", funnel=counted, since=begin, until=last, most=outcomes.NEWEST)


@router.get("/preferences/{group_id}")
async def pair(request: Request, context: Here, group_id: str) -> Response:
    values = await asyncio.to_thread(_pair, context, group_id)
    return page(request, context, "preference.html", title="Preference", **values)


def _listing(context: Context, query: Asked) -> dict[str, Any]:
    policy, wanted = context.policy_name, query.wanted
    with context.store.reading() as c:
        begin = preferences.first(c, policy)
        at = begin if query.after is None else _place(query.after, "after")
        if at == begin:
            listed, counted = preferences.page_counted(c, policy, wanted, at, query.limit)
        else:
            listed = preferences.page(c, policy, wanted, at, query.limit)
            counted = preferences.counted(c, policy, wanted, begin)
        views = saved_views.list_(c, policy)
    given = query.texts
    here = given | ({"after": query.after} if query.after else {})
    shown = len(listed.group_ids)
    goes_on = {**here, "limit": query.limit, "shown": shown, "at": _text(listed.next or Place(begin.top, 0))}
    return {
        **_shown(query, lines_of(context.store, policy, listed.group_ids), counted),
        "has_lines": shown > 0,
        "choices": CHOICES,
        "views": [(view, urlencode(view.filters)) for view in views],
        "days": urlencode([(name, given[name]) for name in ("since", "until") if name in given]),
        "here": urlencode(here),
        "older": _older(listed.next, given),
        "looked": preferences.WINDOW,
        "is_cut": listed.is_cut,
        "search": urlencode(goes_on) if listed.is_cut or counted.is_cut else None,
        "is_going_on": listed.is_cut and shown < query.limit,
        "formats": FORMATS,
        "is_empty": begin.top == 0,
    }


def _shown(query: Asked, lines: Sequence[Line], counted: Counted) -> dict[str, Any]:
    """What a page and each step of its search are both rendered from."""
    given = query.texts
    return {
        "lines": lines,
        "counted": counted,
        "given": given,
        "query": urlencode(given),
        "facets": facets_of(counted, given),
        "said": said,
        "states": STATE_WORDS,
        "is_first": query.after is None,
    }


def _steps(context: Context, query: Searched) -> Iterator[Found]:
    """What each window adds to the page that asked."""
    policy, room = context.policy_name, max(0, query.limit - query.shown)
    left = room
    for step in searches.through_all(context.store, policy, query.wanted, _place(query.at, "at"), room):
        left -= len(step.new)
        values = _shown(query, lines_of(context.store, policy, step.new), step.counted) | {
            "has_lines": left < query.limit,
            "there_are": step.there_are,
            "older": _older(step.next, query.texts),
            "looked": step.counted.looked,
            "is_cut": step.next is not None and left > 0,
        }
        yield rendered("_found_rows.html", {name: template for name, template in PARTS.items() if room or name != FOOT}, values)


def _place(text: str, param: str) -> Place:
    match = _PLACE.fullmatch(text)
    if match is None:
        raise InvalidRequestError(f"{param} is a place that a page named, such as 120-70; leave it out", param=param)
    return Place(int(match[1]), int(match[2]))


def _text(place: Place) -> str:
    return f"{place.top}-{place.before}"


def _older(at: Place | None, given: Mapping[str, str]) -> str | None:
    return None if at is None else urlencode({**given, "after": _text(at)})


def _pair(context: Context, group_id: str) -> dict[str, Any]:
    policy = context.policy_name
    with context.store.reading() as c:
        group = groups.get(c, group_id)
        if group is None or group.policy != policy:
            raise NotFoundError(f"no group {group_id!r} of {policy}", param="group_id")
        rows = feedback.history(c, group_id)
        outcome = outcomes.outcomes(c, policy, [group_id])[group_id]
        reasons = set_aside.reasons(c, [row.feedback_id for row in rows])
        decisions = marks.history(c, group_id)
        told = is_revealed(c, group)
        held = {one.dataset_id: datasets.get(c, one.dataset_id) for one in outcome.datasets}
    counting = {row.feedback_id for row in feedback.latest_revisions(rows)}
    why = tuple(reason for row, (reason, _) in reasons.items() if row in counting)
    return {
        "group": group,
        "turns": _turns(group),
        "is_told": told,
        "answers": _answers(group, chosen_of([row for row in rows if row.feedback_id in counting])),
        "votes": [(row, row.feedback_id in counting, reasons.get(row.feedback_id)) for row in rows[-SHOWN_VOTES:]],
        "n_votes": len(rows),
        "outcome": outcome,
        "held": held,
        "why": WHY,
        "said": said,
        "why_in_none": why_in_none(group, outcome, why, has_votes=bool(rows)),
        "decided": decisions,
        "shown": SHOWN,
    }


def _turns(group: Group) -> list[tuple[str, str, int]]:
    """(role, text, all its characters) of each turn, the newest twenty."""
    if isinstance(group.prompt, str):
        return [("prompt", group.prompt[:SHOWN], len(group.prompt))]
    return [(turn.role, turn.content[:SHOWN], len(turn.content)) for turn in group.prompt[-20:]]


def _answers(group: Group, chosen: int | None) -> list[dict[str, Any]]:
    """Each answer with its words; of two, in pieces that say what only one of them has."""
    texts = [answer.text for answer in group.completions]
    pieces = diff(*texts) if len(texts) == 2 else None
    shown: list[list[Piece]] = list(pieces) if pieces else [[Piece(text[:SHOWN], is_own=False)] for text in texts]
    return [
        {
            "letter": letter_of(index),
            "pieces": shown[index],
            "length": len(answer.text),
            "is_cut": pieces is None and len(answer.text) > SHOWN,
            "role": "" if chosen is None else "chosen" if index == chosen else "rejected",
            "completion": answer,
        }
        for index, answer in enumerate(group.completions)
    ]
