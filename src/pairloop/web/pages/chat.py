"""The first page: two answers to pick from, beside the loop as it turns. Who is signed in picks under their own name."""

from __future__ import annotations

import asyncio
import re
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from pairloop.web.callers import caller_of, name_of
from pairloop.web.context import Here
from pairloop.web.cookies import VISITOR_COOKIE
from pairloop.web.pages.live import is_operator, view_of
from pairloop.web.pages.rendering import PageRoute, page

VISITOR_MAX_AGE_S = 365 * 24 * 3600
_VISITOR = re.compile(r"visitor-[0-9a-f]{32}")

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/")
async def first_page(request: Request, context: Here) -> Response:
    own = name_of(caller_of(request.scope), None, "rater_id")
    visitor = request.cookies.get(VISITOR_COOKIE, "") if own is None else own
    known = own is not None or _VISITOR.fullmatch(visitor) is not None
    visitor = visitor if known else f"visitor-{uuid4().hex}"
    status = await asyncio.to_thread(context.board.read)
    picking = context.config.feedback
    shown = {"visitor": visitor, "min_latency_ms": picking.min_latency_ms, "reasons": picking.reasons, **view_of(status)}
    shown["is_operator"] = is_operator(request)
    response = page(request, context, "chat.html", title="Chat", **shown)
    if not known:
        response.set_cookie(VISITOR_COOKIE, visitor, max_age=VISITOR_MAX_AGE_S, httponly=True, samesite="strict")
    return response
