"""The short way in: a body that is right goes straight to what handles it, past routing and dependencies. Plain ASGI.

Whatever is not plainly right takes FastAPI's way, from the same bytes: errors and documentation are its own.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pairloop.errors import PairloopError
from pairloop.web.callers import Caller, caller_of
from pairloop.web.context import Context
from pairloop.web.errors import from_error
from pairloop.web.headers import header
from pairloop.web.replies import JSON

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Shortcut(Generic[Model]):
    """A POST whose JSON body is a ``model``, and what answers it. ``path`` stands for its route in the metrics."""

    path: str
    model: type[Model]
    handle: Callable[[Model, Context, Caller | None], Awaitable[Response]]

    def read(self, body: bytes) -> Model | None:
        """The body, where it is right."""
        try:
            return self.model.model_validate(json.loads(body))
        except (ValueError, RecursionError):
            return None


class ShortWay:
    """Takes the requests of its shortcuts, and passes on all others."""

    def __init__(self, app: ASGIApp, context: Context, shortcuts: Mapping[str, Shortcut[Any]]) -> None:
        self._app = app
        self._context = context
        self._shortcuts = shortcuts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shortcut = self._shortcuts.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if shortcut is None or header(scope, b"content-type") != JSON:
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
            messages.append(await receive())
        body = None
        if messages[-1]["type"] == "http.request":
            body = shortcut.read(b"".join(message.get("body", b"") for message in messages))
        if body is None:
            await self._app(scope, _again(messages, receive), send)
            return
        scope["route"] = shortcut
        try:
            response = await shortcut.handle(body, self._context, caller_of(scope))
        except PairloopError as error:
            response = from_error(error)
        await response(scope, receive, send)


def _again(messages: list[Message], receive: Receive) -> Receive:
    """What was read already, and then what else comes."""

    async def received() -> Message:
        return messages.pop(0) if messages else await receive()

    return received
