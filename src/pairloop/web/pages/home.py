"""The loop at a glance: the lane, the figures, the alarms; and what to do first where nothing has happened yet."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from pairloop.web.alarms import Alarm, alarms
from pairloop.web.context import Context, Here
from pairloop.web.overview import Overview, is_new
from pairloop.web.pages.live import view_of
from pairloop.web.pages.menu import path_of
from pairloop.web.pages.rendering import PageRoute, client_values, page
from pairloop.web.status import Status

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/home")
async def home(request: Request, context: Here) -> Response:
    status, found, told = await asyncio.to_thread(_read, context)
    return page(request, context, "home.html", title="Home", **_values(request, status, found, told))


def _read(context: Context) -> tuple[Status, Overview, list[Alarm]]:
    status = context.board.read()
    found = context.overview.read(status)
    return status, found, alarms(status, found, draining=context.draining)


def _values(request: Request, status: Status, found: Overview, told: list[Alarm]) -> dict[str, Any]:
    return {
        **view_of(status),
        "found": found,
        "alarms": [(alarm, alarm.page if alarm.page.startswith("/") else path_of(alarm.page)) for alarm in told],
        "is_new": is_new(status),
        **client_values(request),
        "gate": path_of("gate"),
        "schedule": path_of("schedule"),
    }
