"""Preferences: what people said, by filters; one pair with everything about it; and how many get through to training."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.formats.writer import FORMATS
from pairloop.loop.feedback import is_revealed
from pairloop.store import Store, datasets, feedback, groups, marks, outcomes, preferences, saved_views, set_aside
from pairloop.store.outcomes import Outcome
from pairloop.store.preferences import Counted, Listed, Place, State
from pairloop.types import PREFERENCE_METRIC, THUMBS_METRIC, Feedback, Group, GroupKind, Label, Pool, Source
from pairloop.web.context import Context, Here
from pairloop.web.groups import Filters
from pairloop.web.pages.became import state_of, why_in_none
from pairloop.web.pages.rendering import PageRoute, page, render
from pairloop.web.words import WHY, Piece, diff

router = APIRouter(include_in_schema=False, route_class=PageRoute)

PAGE = 50
SNIPPET = 180
"""Characters of a text that the table shows."""
SHOWN = 20_000
"""Characters of a text that a pair's page shows."""
SHOWN_VOTES = 500
FUNNEL_DAYS = 30

STATE_WORDS: Mapping[str, str] = {
    State.WAITING: "waiting for the next dataset",
    State.LEFT_OUT: "left out",
    State.KEPT: "kept in a dataset",
    State.TRAINED: "trained on",
    State.EXCLUDED: "excluded",
    State.JUDGED: "judged a duel",
}
FACETS = ("state", "label", "reason", "pool", "kind", "source", "metric", "version")
CHOICES: Mapping[str, tuple[str, ...]] = {
    "state": tuple(State),
    "label": tuple(Label),
    "pool": tuple(Pool),
    "kind": tuple(kind for kind in GroupKind if kind is not GroupKind.SHADOW),
    "source": tuple(Source),
    "reason": tuple(WHY),
}
_PLACE = re.compile(r"(\d{1,18})-(\d{1,18})")


class Asked(Filters):
    """The page's address: filters, and where in the listing."""

    after: str | None = Field(None, max_length=40)
    limit: int = Field(PAGE, ge=1, le=100)


@dataclass(frozen=True, slots=True)
class Line:
    """A group as the table shows it."""

    group: Group
    question: str
    answers: tuple[tuple[str, str, str], ...]
    """(letter, snippet, what it is: chosen, rejected or nothing)"""
    votes: tuple[Feedback, ...]
    outcome: Outcome
    reasons: tuple[str, ...]
    at: datetime
    state: State
    is_told: bool
    """Whether its versions may be: of a duel once somebody has picked."""


@router.get("/preferences")
async def list_preferences(request: Request, context: Here, query: Annotated[Asked, Query()]) -> Response:
    values = await asyncio.to_thread(_listing, context, query)
    return page(request, context, "preferences.html", title="Preferences", **values)


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
        at = begin if query.after is None else _place(query.after)
        found = preferences.page(c, policy, wanted, at, query.limit)
        counted = preferences.counted(c, policy, wanted, begin)
        views = saved_views.list_(c, policy)
    lines = _lines(context.store, policy, found)
    given = query.texts
    return {
        "lines": lines,
        "counted": counted,
        "given": given,
        "facets": _facets(counted, given),
        "choices": CHOICES,
        "said": said,
        "states": STATE_WORDS,
        "views": [(view, urlencode(view.filters)) for view in views],
        "query": urlencode(given),
        "days": urlencode([(name, given[name]) for name in ("since", "until") if name in given]),
        "here": urlencode(given | ({"after": query.after} if query.after else {})),
        "older": _older(found, given),
        "is_cut": found.is_cut,
        "is_first": query.after is None,
        "window": preferences.WINDOW,
        "formats": FORMATS,
        "is_empty": begin.top == 0,
    }


def _place(text: str) -> Place:
    match = _PLACE.fullmatch(text)
    if match is None:
        raise InvalidRequestError("after is a place that a page named, such as 120-70; leave it out", param="after")
    return Place(int(match[1]), int(match[2]))


def _older(found: Listed, given: Mapping[str, str]) -> str | None:
    if found.next is None:
        return None
    return urlencode({**given, "after": f"{found.next.top}-{found.next.before}"})


def _facets(counted: Counted, given: Mapping[str, str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each facet with its values, the most frequent first; a value that is set leads to the same page without it."""
    shown = []
    for name in FACETS:
        values = dict(counted.facets.get(name, {}))
        if name in given:
            values.setdefault(given[name], 0)
        others = {key: value for key, value in given.items() if key != name}
        links = [
            {
                "word": STATE_WORDS.get(value, value) if name == "state" else value,
                "n": n,
                "is_set": given.get(name) == value,
                "query": urlencode(others if given.get(name) == value else {**others, name: value}),
                "why": WHY.get(value, "") if name == "reason" else "",
            }
            for value, n in sorted(values.items(), key=lambda item: (-item[1], item[0]))[:12]
        ]
        if len(links) > 1 or name in given:
            shown.append((name, links))
    return shown


def _lines(store: Store, policy: str, found: Listed) -> list[Line]:
    with store.reading() as c:
        by_id = {group.group_id: group for group in groups.load_ids(c, found.group_ids)}
        said = {group_id: feedback.for_group(c, group_id) for group_id in by_id}
        became = outcomes.outcomes(c, policy, found.group_ids)
        reasons = set_aside.reasons(c, [row.feedback_id for rows in said.values() for row in rows])
    lines = []
    for group_id in found.group_ids:
        if group_id in by_id and said[group_id]:  # neither was erased since
            why = [reasons[row.feedback_id][0] for row in said[group_id] if row.feedback_id in reasons]
            lines.append(_line(by_id[group_id], said[group_id], became[group_id], tuple(dict.fromkeys(why))))
    return lines


def _line(group: Group, votes: list[Feedback], outcome: Outcome, reasons: tuple[str, ...]) -> Line:
    chosen = _chosen(votes)
    answers = []
    for index, answer in enumerate(group.completions[:4]):
        role = "" if chosen is None else "chosen" if index == chosen else "rejected"
        answers.append((_letter(index), answer.text[:SNIPPET], role))
    return Line(
        group=group,
        question=question_of(group)[:SNIPPET],
        answers=tuple(answers),
        votes=tuple(votes),
        outcome=outcome,
        reasons=reasons,
        at=max(row.created_at for row in votes),
        state=state_of(group, outcome, reasons),
        is_told=group.kind is not GroupKind.DUEL or any(row.label not in (None, Label.SKIP) for row in votes),
    )


def _chosen(votes: list[Feedback]) -> int | None:
    """The answer that all decisive picks agree on."""
    picked = {row.label for row in votes if row.metric == PREFERENCE_METRIC and row.label in (Label.A, Label.B)}
    return None if len(picked) != 1 else (0 if picked == {Label.A} else 1)


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def said(row: Feedback) -> str:
    """What a vote says, in a word or two; texts stand elsewhere."""
    if row.label is not None:
        return row.label.replace("_", " ")
    metric = row.metric[:24]
    if isinstance(row.value, bool):
        return f"{metric} {('up' if row.value else 'down') if row.metric == THUMBS_METRIC else row.value}"
    return metric if row.value is None or isinstance(row.value, str) else f"{metric} {row.value:.4g}"


def question_of(group: Group) -> str:
    """The last thing that was asked."""
    if isinstance(group.prompt, str):
        return group.prompt
    asked = [message.content for message in group.prompt if message.role == "user"]
    return asked[-1] if asked else ""


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
        "answers": _answers(group, _chosen([row for row in rows if row.feedback_id in counting])),
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
            "letter": _letter(index),
            "pieces": shown[index],
            "length": len(answer.text),
            "is_cut": pieces is None and len(answer.text) > SHOWN,
            "role": "" if chosen is None else "chosen" if index == chosen else "rejected",
            "completion": answer,
        }
        for index, answer in enumerate(group.completions)
    ]
