"""The loop at a glance."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from pairloop.web.context import Here
from pairloop.web.pages.live import view_of
from pairloop.web.pages.rendering import PageRoute, page

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/home")
async def home(request: Request, context: Here) -> Response:
    status = await asyncio.to_thread(context.board.read)
    return page(request, context, "home.html", title="Home", **view_of(status))
