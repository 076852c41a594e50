"""The outermost layer, plain ASGI: request ids, timing, metrics, the body limit, cross-site refusals, and the last resort."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping
from time import perf_counter
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid7

from pairloop.web.errors import error_response
from pairloop.web.metrics import Metrics

logger = logging.getLogger(__name__)

UNMATCHED = "unmatched"
DRAINED_BYTES = 128_000_000


class Outermost:
    """Gives every response its ``x-request-id`` and ``openai-processing-ms``, counts it, and turns a crash into a 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, request_id, status = perf_counter(), f"req_{uuid7().hex}", 0

        async def send_signed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed_s = perf_counter() - begun
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round(elapsed_s * 1000))
                self._count(scope, status, elapsed_s)
            await send(message)

        try:
            await self._app(scope, receive, send_signed)
        except Exception:  # the supervisor line: logged with its request id, answered with a 500
            logger.exception("request %s (%s %s) failed", request_id, scope["method"], scope["path"])
            if status:
                return  # the response has begun; the client sees it end early
            response = error_response(
                500, f"Internal error; the server's log has it under {request_id}.", code="internal_error"
            )
            await response(scope, receive, send_signed)

    def _count(self, scope: Scope, status: int, elapsed_s: float) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self._metrics.requests.labels(route, scope["method"], str(status)).inc()
        self._metrics.latency.labels(route).observe(elapsed_s)


class SameSite:
    """Refuses a browser's cross-site request: without keys, any web page could otherwise drive a server on loopback.

    Neither may a page whose own name was made to resolve to loopback (DNS rebinding; its origin is the host it asks for, so
    only the name tells): the Host header has to be a loopback address or localhost, on every path.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = headers.get("host", "")
            if not _is_loopback(host):
                text = f"This server answers to 127.0.0.1, [::1] and localhost only, not to the host {host[:200]!r}."
                response = error_response(421, text, code="wrong_host")
                await response(scope, receive, send)
                return
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != host:
                response = error_response(403, f"Requests from the site {origin[:200]} are not taken.", code="cross_site")
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_loopback(host: str) -> bool:
    """Whether a Host header (``name``, ``name:port`` or ``[address]:port``) names loopback by address, or as localhost."""
    bracketed = host.startswith("[")
    name, _, rest = host[bracketed:].partition("]" if bracketed else ":")
    port = rest.removeprefix(":") if bracketed else rest
    if port and not (port.isascii() and port.isdigit()):
        return False
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class BodyLimit:
    """Refuses bodies beyond ``limit`` bytes with 413, by their declared length or, where chunked, once they exceed it.

    The rest of a refused body is read and thrown away, up to a bound: a client that is still sending would otherwise see a
    broken connection instead of the reason.
    """

    def __init__(self, app: ASGIApp, limit: int, uploads: Mapping[tuple[str, str], int] | None = None) -> None:
        """``uploads``: method and path of routes with a limit of their own (``serve.max_file_bytes``)."""
        self._app = app
        self._limit = limit
        self._uploads = dict(uploads or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        own = self._uploads.get((scope["method"], scope["path"]))
        limit = self._limit if own is None else own
        text = f"The body is larger than {limit} bytes (serve.{'max_body_bytes' if own is None else 'max_file_bytes'})."
        if int(headers.get("content-length", "0")) > limit:
            drained = "expect" not in headers and await _drain(receive)
            response = error_response(413, text, headers=None if drained else {"connection": "close"})
            await response(scope, receive, send)
            return
        read = 0

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                await _drain(receive)
                raise HTTPException(413, text)
            return message

        await self._app(scope, receive_counted, send)


async def _drain(receive: Receive) -> bool:
    """Read to the end of the body; False where it is longer than anyone should send, or its client is gone."""
    read = 0
    while read < DRAINED_BYTES:
        message = await receive()
        read += len(message.get("body", b""))
        if not message.get("more_body", False):
            whole: bool = message["type"] == "http.request"
            return whole
    return False
