"""The audit trail, to look through: who did what, when and why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from pairloop.errors import InvalidRequestError
from pairloop.store import Store, audit, keys
from pairloop.store.audit import AuditAction, AuditEntry
from pairloop.web.audit import About, Action, ByActor
from pairloop.web.context import Here
from pairloop.web.pages.rendering import PageRoute, page
from pairloop.web.paging import After

PER_PAGE = 50
Day = Annotated[str, Query(max_length=10, description="A day (UTC) such as 2026-03-01.")]

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/audit")
async def audit_page(
    request: Request,
    context: Here,
    action: Action = None,
    actor: ByActor = None,
    subject: About = None,
    since: Day = "",
    until: Day = "",
    after: After = None,
) -> Response:
    """``since`` and ``until``: days, both included; ``after``: the page begins behind this entry."""
    begin, last = _midnight("since", since), _midnight("until", until)
    end = None if last is None else last + timedelta(days=1)
    filters = {"action": action or None, "actor": actor or None, "subject": subject or None, "since": begin, "until": end}
    found, names = await asyncio.to_thread(_read, context.store, after, filters)
    asked = {"action": action, "actor": actor, "subject": subject, "since": since, "until": until}
    given = {name: value for name, value in asked.items() if value}
    return page(
        request,
        context,
        "audit.html",
        title="Audit",
        entries=found[:PER_PAGE],
        names=names,
        asked=asked,
        actions=list(AuditAction),
        here=urlencode(given),
        export=urlencode(_as_seconds(filters)),
        more=urlencode({**given, "after": found[PER_PAGE - 1].audit_id}) if len(found) > PER_PAGE else None,
        after=after,
        pretty=_pretty,
    )


def _read(store: Store, after: str | None, filters: Mapping[str, Any]) -> tuple[list[AuditEntry], dict[str, str]]:
    """A page and one more, and the names of the keys in it."""
    with store.reading() as c:
        found = audit.list_(c, limit=PER_PAGE + 1, after=after, **filters)
        named = {text for entry in found for text in (entry.actor, entry.subject) if text.startswith("key:")}
        return found, keys.names_of(c, {text.removeprefix("key:") for text in named})


def _midnight(param: str, text: str) -> datetime | None:
    """The beginning of a day."""
    if not text:
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        day = date.max
    if day >= date.max or day < date(1970, 1, 1):
        raise InvalidRequestError(f"{param} = {text!r} is no day such as 2026-03-01", param=param)
    return datetime.combine(day, time(), UTC)


def _as_seconds(filters: Mapping[str, Any]) -> dict[str, str | int]:
    """The filters as the API takes them."""
    given = {name: value for name, value in filters.items() if value is not None}
    return {name: int(value.timestamp()) if isinstance(value, datetime) else value for name, value in given.items()}


def _pretty(details: Mapping[str, Any]) -> str:
    return json.dumps(details, indent=1, ensure_ascii=False, sort_keys=True)
