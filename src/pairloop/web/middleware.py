"""The outermost layers, plain ASGI: request ids, timing, metrics, whom a request asks for, the body limit, the last resort."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Sequence
from time import perf_counter
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid7

from pairloop.errors import PairloopError, log_failure
from pairloop.loop.serve.stopwatch import watch
from pairloop.telemetry import logs
from pairloop.web.callers import CALLER
from pairloop.web.errors import ERROR_CODE, error_response, from_error
from pairloop.web.headers import header, secured
from pairloop.web.metrics import Metrics
from pairloop.web.scopes import rule_of
from pairloop.web.sites import site_of
from pairloop.web.tracing import TRACE

logger = logging.getLogger(__name__)

UNMATCHED = "unmatched"
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""Counted by their names; others could be as many as clients think of."""
LONGEST_PATH = 200
DRAINED_BYTES = 128_000_000
SLOWEST_BYTES_PER_S = 10_000
UPLOADS = "/v1/files"
KNOWN_HOSTS = 256
"""Host headers remembered as ours."""
VERSION_HEADER = b"x-pairloop-model-version"
_TRACE = re.compile(r"[0-9a-f]{2}-(?P<trace>[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Outermost:
    """Gives every response its ``x-request-id``, its time and what keeps browsers safe, counts it; a crash is a 500.

    The id is always our own, so that it is one request's only; ``traceparent`` ties a request to its sender's, in the log. A
    reply that names its version says what it cost beside sampling, too: a duel's does not, for the time would tell its sides.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, request_id, status, sampled = perf_counter(), f"req_{uuid7().hex}", 0, watch()

        async def send_signed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed_s = perf_counter() - begun
                headers = message["headers"] = secured(message["headers"], scope["scheme"])
                headers += [
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", str(round(elapsed_s * 1000)).encode()),
                ]
                overhead_s = max(0.0, elapsed_s - sampled.seconds)
                if any(name == VERSION_HEADER for name, _ in headers):
                    headers.append((b"x-pairloop-overhead-ms", f"{1000 * overhead_s:.2f}".encode()))
                self._count(scope, status, elapsed_s)
                if sampled.has_run:
                    self._metrics.sampled(message, elapsed_s, overhead_s)
                if logger.isEnabledFor(logging.INFO):
                    _log_access(scope, status, elapsed_s)
            await send(message)

        try:
            with logs.about(request_id=request_id):
                await self._app(scope, receive, send_signed)
        except PairloopError as error:  # of a layer around the routes, which have a handler of their own
            if not status:
                await from_error(error)(scope, receive, send_signed)
        except Exception as error:  # noqa: BLE001 - the supervisor line: logged with its request id, answered with a 500
            fields = logs.extra(request_id=request_id, trace_id=trace_of(scope))
            log_failure(logger, error, "%s %s failed", scope["method"], _route(scope), extra=fields)
            if status:
                return  # the response has begun; the client sees it end early
            response = error_response(
                500, f"Internal error; the server's log has it under {request_id}.", code="internal_error"
            )
            await response(scope, receive, send_signed)

    def _count(self, scope: Scope, status: int, elapsed_s: float) -> None:
        route = _route(scope)
        method = scope["method"] if scope["method"] in METHODS else "other"  # a series is kept for good
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.latency.labels(route).observe(elapsed_s)
        if ERROR_CODE in scope:
            self._metrics.errors.labels(scope[ERROR_CODE]).inc()
        for name, value in scope["headers"]:
            if name == b"x-stainless-retry-count" and value.isdigit() and int(value[:9]):
                self._metrics.retries.inc()


def _route(scope: Scope) -> str:
    """The route's pattern, which holds no id: those in a path may be people's."""
    path: str = getattr(scope.get("route"), "path", UNMATCHED)
    return path


def _place(method: str, path: str) -> str:
    """Where a request went that no route was found for, or that was refused before: without what may be somebody's id."""
    rule = rule_of(method, path)
    return rule.path if rule is not None else "/".join(path.split("/")[: 3 if path.startswith("/v1/") else 2])[:LONGEST_PATH]


def _log_access(scope: Scope, status: int, elapsed_s: float) -> None:
    """One line a request: what was asked for and by which key, what came of it; nothing of what was said."""
    kind, _, key = str(scope.get(CALLER, "")).partition(":")
    method, route, ms = scope["method"], _route(scope), round(1000 * elapsed_s, 1)
    fields = logs.extra(
        method=method,
        route=route,
        path=_place(method, scope["path"]) if route == UNMATCHED else None,
        status=status,
        ms=ms,
        key=key if kind == "key" else None,
        code=scope.get(ERROR_CODE),
        trace_id=trace_of(scope),
    )
    logger.info("%s %s answered %d after %.1f ms", method, route, status, ms, extra=fields)


def trace_of(scope: Scope) -> str | None:
    """The id of the trace that a request is part of: its span's, else that of its W3C ``traceparent``."""
    if TRACE in scope:
        found: str = scope[TRACE]
        return found
    match = _TRACE.fullmatch(header(scope, b"traceparent") or "")
    return match["trace"] if match is not None else None


class Sites:
    """Refuses a browser's cross-site request, and one that asks for a host that this server is not.

    Without keys any web page could otherwise drive a server on loopback. Neither may a page whose own name was made to resolve
    to loopback (DNS rebinding; its origin is the host it asks for, so only the name tells): the Host header has to be a
    loopback address, localhost, or one of ``hosts``, on every path. Where the server listens beyond loopback (``beyond``; it
    has keys then) any address will do, for only a name can be rebound. Pages of ``origins`` may call from elsewhere.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str] = (), origins: Sequence[str] = (), beyond: bool = False) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)
        self._beyond = beyond
        self._known: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            place = _nul_in(scope)
            if place is not None:
                text = f"Invalid {place}: it holds a NUL (%00), which no id and no name has."
                await error_response(400, text, param=place, code="invalid_value")(scope, receive, send)
                return
            host = header(scope, b"host") or ""
            if host not in self._known and not self._is_ours(host):
                text = (
                    f"This server does not answer to the host {host[:200]!r}: it knows 127.0.0.1, [::1], localhost and what "
                    "serve.allowed_hosts names."
                )
                await error_response(421, text, code="wrong_host")(scope, receive, send)
                return
            origin = header(scope, b"origin")
            if origin is not None and site_of(origin) != host and origin not in self._origins:
                text = f"Requests from the site {origin[:200]} are not taken; serve.allowed_origins names those that are."
                await error_response(403, text, code="cross_site")(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        ours = self._would_answer_to(host)
        if ours and len(self._known) < KNOWN_HOSTS:
            self._known.add(host)
        return ours

    def _would_answer_to(self, host: str) -> bool:
        name = host_name(host)
        if name is None:
            return False
        if name in self._hosts or "*" in self._hosts or name == "localhost":
            return True
        try:
            return ipaddress.ip_address(name).is_loopback or self._beyond
        except ValueError:
            return False


def _nul_in(scope: Scope) -> str | None:
    """Where the URL holds a NUL: the query parameter, or ``url``; None where it holds none."""
    if "\0" in scope["path"]:
        return "url"
    if b"%00" not in scope["query_string"]:
        return None
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    return next((name for name, value in query if "\0" in value and "\0" not in name), "url")


def host_name(host: str) -> str | None:
    """The name or address in a Host header (``name``, ``name:port`` or ``[address]:port``), in small letters."""
    bracketed = host.startswith("[")
    name, closed, rest = host[bracketed:].partition("]" if bracketed else ":")
    port = rest.removeprefix(":") if bracketed else rest
    if bracketed and not closed:
        return None  # no URL can be made of it
    if port and not (port.isascii() and port.isdigit()):
        return None
    return name.lower() or None


class BodyLimit:
    """Refuses bodies beyond a limit with 413, by their declared length or, where chunked, once they exceed it.

    The rest of a refused body is read and thrown away, up to a bound: a client that is still sending would otherwise see a
    broken connection instead of the reason. A body that does not come is not waited for: 408 after ``timeout_s`` of silence,
    or where it comes at under 10 kB a second.
    """

    def __init__(self, app: ASGIApp, *, limit: int, upload_limit: int, timeout_s: float) -> None:
        self._app = app
        self._limit = limit
        self._upload_limit = upload_limit
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        uploads = scope["path"] == UPLOADS
        limit = self._upload_limit if uploads else self._limit
        text = f"The body is larger than {limit} bytes (serve.{'max_file_bytes' if uploads else 'max_body_bytes'})."
        if int(header(scope, b"content-length") or "0") > limit:
            drained = header(scope, b"expect") is None and await _drain(receive)
            response = error_response(413, text, headers=None if drained else {"connection": "close"})
            await response(scope, receive, send)
            return
        read, complete, begun = 0, False, perf_counter()

        async def receive_counted() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                left_s = begun + self._timeout_s + read / SLOWEST_BYTES_PER_S - perf_counter()
                async with asyncio.timeout(min(self._timeout_s, left_s)):
                    message = await receive()
            except TimeoutError as error:
                raise _too_slow(read) from error
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > limit:
                await _drain(receive)
                raise HTTPException(413, text)
            return message

        try:
            await self._app(scope, receive_counted, send)
        except HTTPException as refused:  # raised by a layer between this one and the routes, which answer their own
            await error_response(refused.status_code, refused.detail, headers=refused.headers)(scope, receive, send)


def _too_slow(read: int) -> HTTPException:
    text = f"The rest of the body did not come in time (serve.body_timeout); {read} bytes had."
    return HTTPException(408, text, headers={"connection": "close"})


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
