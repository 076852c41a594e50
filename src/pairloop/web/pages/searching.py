"""A search that goes on by itself in an open page: what each window adds, as server-sent events (static/search.js)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NamedTuple

from fastapi import Request, Response

from pairloop.errors import PairloopError
from pairloop.web.context import Context
from pairloop.web.pages.live import EventStream, may_stay
from pairloop.web.pages.rendering import fragment

logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """``rows``: HTML behind the last row; ``parts``: HTML of elements, by their ids, as they are now."""

    rows: str
    parts: Mapping[str, str]


def rendered(rows: str, parts: Mapping[str, str], values: Mapping[str, Any]) -> Found:
    """Templates rendered with ``values``."""
    return Found(fragment(rows, values), {name: fragment(template, values) for name, template in parts.items()})


def going_on(request: Request, context: Context, steps: Iterator[Found]) -> Response:
    """``found`` for each step, then ``end``. Who leaves the page or presses Stop hangs up, and no further step is taken.

    Nor is one told to who would not be let in any more. A search that ends early says no ``end``; the page says that it broke
    off. Of all searches `SEARCHES_AT_ONCE` take a step at a time.
    """
    return EventStream(context, _events(request, context, steps))


async def _events(request: Request, context: Context, steps: Iterator[Found]) -> AsyncIterator[str]:
    try:
        while not context.draining:
            async with context.searching:
                step = await asyncio.to_thread(next, steps, None)
            if step is None:
                yield "event: end\ndata: {}\n\n"
                return
            if not await may_stay(request, context):
                return
            yield f"event: found\ndata: {json.dumps(step._asdict())}\n\n"
    except PairloopError as error:  # the answer has begun, and the page keeps what was found
        logger.warning("a search ended early: %s", error)
