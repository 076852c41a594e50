"""What moves by itself: the events that tell an open page to look again, and the card of the loop as it turns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from pairloop.store.keys import Scope
from pairloop.types import CycleState
from pairloop.web.callers import CALLER, caller_of, may_open
from pairloop.web.context import Context, Here
from pairloop.web.errors import error_response
from pairloop.web.pages.rendering import PageRoute, render
from pairloop.web.scopes import scopes_of
from pairloop.web.status import STAGES, Status

LOOK_EVERY_S = 1.0
RETRY_S = 30
"""When who found no place for a stream may ask again; static/live.js waits as long."""
BEAT_S = 15.0
"""A comment goes out at least so often: who is gone is found when it cannot be sent."""

STAGE_WORDS: Mapping[str, str] = {
    "building": "pairs",
    "training": "train",
    "checking": "evaluate",
    "duelling": "gate",
    "canary": "canary",
}

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/page/events")
async def events(request: Request, context: Here) -> Response:
    """Server-sent events: ``tick`` when the loop's figures changed, ``moved`` when its history did."""
    return EventStream(context, _events(request, context))


@router.get("/page/live")
async def live(request: Request, context: Here) -> Response:
    """The running cycle and the last verdict, alone."""
    return render("_live.html", **view_of(await asyncio.to_thread(context.board.read)), is_operator=is_operator(request))


class EventStream(StreamingResponse):
    """Server-sent events, where there is still a place for a stream; it has that place until it ends, however it does."""

    def __init__(self, context: Context, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._places = context.streams

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        with self._places.taken(scope[CALLER]) as refusal:
            if refusal is None:
                await super().__call__(scope, receive, send)
            else:
                await _full(refusal)(scope, receive, send)


def _full(whose: Literal["caller", "all"]) -> Response:
    status, text = (429, "You have") if whose == "caller" else (503, "There are")
    text += " too many streams of events open here; close a page, or look again later."
    return error_response(status, text, code="too_many_streams", headers={"retry-after": str(RETRY_S)})


async def _events(request: Request, context: Context) -> AsyncIterator[str]:
    """Until the page is left, the server drains, or who asks would not be let in any more."""
    told: Status | None = None
    quiet_s = 0.0
    while not context.draining and not await request.is_disconnected() and await may_stay(request, context):
        status = await asyncio.to_thread(context.board.read)
        if told is None or status.now != told.now:
            name = "tick" if told is not None and status.revision == told.revision else "moved"
            yield f"event: {name}\ndata: {json.dumps(status.revision)}\n\n"
            told, quiet_s = status, 0.0
        elif quiet_s >= BEAT_S:
            yield ": still here\n\n"
            quiet_s = 0.0
        await asyncio.sleep(LOOK_EVERY_S)
        quiet_s += LOOK_EVERY_S


async def may_stay(request: Request, context: Context) -> bool:
    """Whether who asked would be let in now."""
    return await context.keys.still(caller_of(request.scope), scopes_of("GET", request.scope["path"]))


def is_operator(request: Request) -> bool:
    """Who only rates is not told how the open duel stands: it would steer who goes on voting."""
    return may_open(request.scope, frozenset({Scope.OPERATE}))


def view_of(status: Status) -> dict[str, Any]:
    """What the loop's card is rendered from."""
    return {"status": status, "now": status.now, "stages": stages_of(status.now.state)}


def stages_of(state: str) -> list[dict[str, str]]:
    """Each stage with its word and whether it is done, now or still to come."""
    stages = (*STAGES, CycleState.CANARY) if state == CycleState.CANARY else STAGES
    reached = next((position for position, stage in enumerate(stages) if stage == state), -1)
    names = []
    for position, stage in enumerate(stages):
        when = "now" if position == reached else "done" if position < reached else "todo"
        names.append({"word": STAGE_WORDS[stage.value], "when": when})
    return names
