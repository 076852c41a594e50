"""The labelling queue: one comparison after the other, by keyboard, blind."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Request, Response

from pairloop.loop import raters as desk
from pairloop.types import Pool
from pairloop.web.callers import caller_of
from pairloop.web.context import Here
from pairloop.web.pages.rendering import PageRoute, page
from pairloop.web.wire import NO_NUL

router = APIRouter(include_in_schema=False, route_class=PageRoute)

MAX_GUIDELINES = 200_000
"""Bytes of guidelines that are shown."""
TODAY_SHOWN = 12

Who = Annotated[str | None, Query(min_length=1, max_length=512, pattern=NO_NUL)]


class Guidelines(NamedTuple):
    """What the queue shows above the answers; ``version`` is a hash of the text, ``problem`` why there is none."""

    text: str
    version: str
    problem: str = ""


@router.get("/queue")
async def labelling(request: Request, context: Here, rater: Who = None) -> Response:
    caller = caller_of(request.scope)
    who = caller.owner.name if caller is not None else rater
    values: dict[str, Any] = {
        "rater": who,
        "is_signed_in": caller is not None,
        "settings": context.config.queue,
    }
    if who is None:
        return page(request, context, "queue.html", title="Labelling queue", progress=None, guidelines=None, **values)
    progress = await asyncio.to_thread(desk.progress, context.store, context.config, who)
    guidelines = await asyncio.to_thread(read_guidelines, context.config.queue.guidelines)
    values |= {"progress": progress, "guidelines": guidelines, "pools": list(Pool), "today_shown": TODAY_SHOWN}
    return page(request, context, "queue.html", title="Labelling queue", **values)


def read_guidelines(path: Path | None) -> Guidelines | None:
    """The configured file as it is now; bytes that are no UTF-8 are replaced. None where none is configured."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_GUIDELINES)
    except OSError as error:
        return Guidelines("", "", f"queue.guidelines: {path} cannot be read ({error.strerror or error})")
    return Guidelines(raw.decode("utf-8", "replace"), hashlib.sha256(raw).hexdigest()[:12])
