"""The audit trail over HTTP, and who a request's acts are recorded under."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from pairloop.client.shapes import AuditResource, Page
from pairloop.store import audit
from pairloop.store.audit import AuditEntry
from pairloop.web.access import CALLER
from pairloop.web.context import Here
from pairloop.web.paging import After, Limit, page
from pairloop.web.resources import seconds

router = APIRouter(tags=["loop"])

BY_HAND = "by hand, over the API"
LATEST_S = 253_402_300_799
"""The last second of the year 9999."""
Since = Annotated[int | None, Query(ge=0, le=LATEST_S, description="Unix seconds: only what was done from then on.")]
Action = Annotated[str | None, Query(max_length=32, description="Only this, such as promote or rollback.")]


def actor_of(request: Request) -> str:
    return str(request.scope.get(CALLER, "address:unknown"))


Actor = Annotated[str, Depends(actor_of)]
"""``key:<id>``, or ``address:<ip>`` while there are no keys."""


@router.get("/v1/audit", summary="What was done to the loop, by whom and why, newest first")
def list_audit(
    context: Here, limit: Limit = 20, after: After = None, since: Since = None, action: Action = None
) -> Page[AuditResource]:
    begin = None if since is None else datetime.fromtimestamp(since, UTC)
    with context.store.reading() as c:
        found = audit.list_(c, limit=limit + 1, after=after, since=begin, action=action)
    return page([_resource(entry) for entry in found], limit=limit)


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
