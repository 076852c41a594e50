"""The audit trail over HTTP, and who a request's acts are recorded under."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.responses import StreamingResponse

from pairloop.client.shapes import AuditResource, Page
from pairloop.store import Store, audit
from pairloop.store.audit import AuditEntry
from pairloop.web.callers import CALLER
from pairloop.web.context import Here
from pairloop.web.paging import After, Limit, page
from pairloop.web.resources import seconds

router = APIRouter(tags=["loop"])

BY_HAND = "by hand, over the API"
LATEST_S = 253_402_300_799
"""The last second of the year 9999."""
AT_ONCE = 1_000
"""Entries that an export reads at a time."""
COLUMNS = ("id", "created_at", "actor", "action", "subject", "reason", "details")
Since = Annotated[int | None, Query(ge=0, le=LATEST_S, description="Unix seconds: only what was done from then on.")]
Until = Annotated[int | None, Query(ge=0, le=LATEST_S, description="Unix seconds: only what was done before.")]
Action = Annotated[str | None, Query(max_length=32, description="Only this, such as promote or rollback.")]
ByActor = Annotated[str | None, Query(max_length=128, description="Only by actors with this in their name.")]
About = Annotated[str | None, Query(max_length=256, description="Only what was done to subjects with this in their name.")]
Format = Annotated[Literal["jsonl", "csv"], Query(description="csv opens in a spreadsheet; jsonl keeps every byte.")]


def actor_of(request: Request) -> str:
    return str(request.scope.get(CALLER, "address:unknown"))


Actor = Annotated[str, Depends(actor_of)]
"""``key:<id>`` or ``account:<name>``, or ``address:<ip>`` while there are neither."""


async def _filters(
    since: Since = None, until: Until = None, action: Action = None, actor: ByActor = None, subject: About = None
) -> dict[str, Any]:
    begin, end = (None if at is None else datetime.fromtimestamp(at, UTC) for at in (since, until))
    return {"since": begin, "until": end, "action": action, "actor": actor, "subject": subject}


Filters = Annotated[dict[str, Any], Depends(_filters)]
"""The filters of `store.audit.list_`."""


@router.get("/v1/audit", summary="What was done to the loop, by whom and why, newest first")
def list_audit(context: Here, filters: Filters, limit: Limit = 20, after: After = None) -> Page[AuditResource]:
    with context.store.reading() as c:
        found = audit.list_(c, limit=limit + 1, after=after, **filters)
    return page([_resource(entry) for entry in found], limit=limit)


@router.get("/v1/audit/export", summary="The audit trail, or a part of it, as a file", response_class=StreamingResponse)
def export_audit(context: Here, filters: Filters, format: Format = "jsonl") -> Response:
    first = _some(context.store, None, filters)  # what is wrong with the filters is said before the file begins
    lines = _lines(context.store, filters, first, _csv_line if format == "csv" else _json_line)
    head = iter([_csv_line(COLUMNS)]) if format == "csv" else iter(())
    media = "text/csv" if format == "csv" else "application/jsonl"
    disposition = {"content-disposition": f'attachment; filename="audit.{format}"'}
    return StreamingResponse((text for part in (head, lines) for text in part), media_type=media, headers=disposition)


def _some(store: Store, after: str | None, filters: Mapping[str, Any]) -> list[AuditEntry]:
    with store.reading() as c:
        return audit.list_(c, limit=AT_ONCE, after=after, **filters)


def _lines(
    store: Store, filters: Mapping[str, Any], found: list[AuditEntry], line: Callable[[Sequence[Any]], str]
) -> Iterator[str]:
    """One text for each entry, newest first."""
    while found:
        yield "".join(line([getattr(one, name) for name in COLUMNS]) for one in map(_resource, found))
        found = _some(store, found[-1].audit_id, filters) if len(found) == AT_ONCE else []


def _json_line(values: Sequence[Any]) -> str:
    return json.dumps(dict(zip(COLUMNS, values, strict=True)), ensure_ascii=False) + "\n"


def _csv_line(values: Sequence[Any]) -> str:
    """A spreadsheet takes what begins with = + - @ for a formula; a reason is anybody's text, so it gets an apostrophe."""
    cells = [json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value) for value in values]
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(
        ["'" + cell if cell[:1] in "=+-@\t\r" and cell else cell for cell in cells]
    )
    return line.getvalue()


def _resource(entry: AuditEntry) -> AuditResource:
    return AuditResource(
        id=entry.audit_id,
        actor=entry.actor,
        action=entry.action,
        subject=entry.subject,
        reason=entry.reason,
        details=dict(entry.details),
        created_at=seconds(entry.at),
    )
