"""The versions: their curve, the picture people share; and each one's page, from the picks it learned from to its service."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request, Response

from pairloop.loop import export
from pairloop.types import BASE_VERSION, Alias
from pairloop.web import history, lineage
from pairloop.web.context import Context, Here
from pairloop.web.curve_plot import By, moves, versions_plot
from pairloop.web.history import History, views_of
from pairloop.web.lineage import Lineage
from pairloop.web.pages.menu import path_of
from pairloop.web.pages.rendering import PageRoute, page
from pairloop.web.plots import draw
from pairloop.web.status import Status
from pairloop.web.wire import MAX_INT32

ROWS = 50
Number = Annotated[int, Path(ge=0, le=MAX_INT32)]
Before = Annotated[int | None, Query(ge=0, le=MAX_INT32)]

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/versions")
async def versions(request: Request, context: Here, x: By = "version", before: Before = None) -> Response:
    status, found = await asyncio.to_thread(_read, context, before)
    here = str(request.url.path) + (f"?{request.url.query}" if request.url.query else "")
    return page(
        request,
        context,
        "versions.html",
        title="Versions",
        here=here,
        x=x,
        before=before,
        found=found,
        now=status.now,
        drawing=draw(
            versions_plot(status.points, history=found.moves, details=found.details, by=x, champion=status.now.champion)
        ),
    )


@router.get("/versions/{number}")
async def version(request: Request, context: Here, number: Number) -> Response:
    found, more = await asyncio.to_thread(_read_one, context, number)
    name = f"{context.policy_name}@{number}"
    return page(request, context, "version.html", title=name, name=name, found=found, **more)


def _read(context: Context, before: int | None) -> tuple[Status, History]:
    status = context.board.read()
    return status, history.read(context.store, status, before=before, limit=ROWS)


def _read_one(context: Context, number: int) -> tuple[Lineage, dict[str, Any]]:
    status, found = context.board.read(), lineage.read(context.store, context.policy_name, number)
    view = views_of(status).get(number)
    return found, {
        "point": next((point for point in status.points if point.contest.challenger == number), None),
        "fate": history.fate(number, moves(found.history), view),
        "beta": history.beta_of(found.version),
        "api": f"/v1/versions/{quote(found.version.name, safe='@')}",
        "policy_api": f"/v1/policies/{quote(context.policy_name, safe='')}",
        "is_champion": found.champion == number,
        "is_canary": Alias.CANARY in found.aliases,
        "is_past_champion": number in found.past_champions,
        "former": found.past_champions[-1] if found.past_champions else None,
        "is_base": number == BASE_VERSION,
        "lack": export.lack_of(context.store, context.config, found.version),
        "links": {icon: path_of(icon) for icon in ("gate", "runs", "datasets", "preferences")},
    }
