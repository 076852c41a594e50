"""Who may come in: keys, sessions, scopes, requests per minute, answers under way. Plain ASGI, before any body is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pairloop.errors import EngineError, StoreBusyError
from pairloop.store import Store
from pairloop.web.callers import CALLER, LET_IN, LOCKED, Caller
from pairloop.web.cookies import renewed, session_token
from pairloop.web.errors import ErrorPage, error_response, from_error, is_for_a_person
from pairloop.web.keyring import KeyRing
from pairloop.web.limits import Buckets, Taken, network_of
from pairloop.web.scopes import Scopes, is_page, scopes_of
from pairloop.web.sites import is_own, own_path

CHAT = "/v1/chat/completions"
GREETING = frozenset({"/docs", "/login", "/logout"})
"""Open to all, but a page that knows who asks, or a form that only our own pages may send."""
WRITING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
LIMIT_HEADER = "x-ratelimit-limit-requests"


@dataclass(frozen=True, slots=True)
class Admission:
    """Who comes in, or the refusal; neither while the server asks nobody. ``cookie``: what prolongs the session."""

    caller: Caller | None = None
    refusal: Response | None = None
    cookie: str | None = None


class Access:
    """Lets a request in with the right key or session (once there are keys or accounts), within its requests per minute.

    Without: 401, a page leads to /login. 403 where the scope is lacking (a page that says so), or where a write comes with the
    cookie but not from our own pages. 429 with retry-after beyond the limit.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing, requests_per_minute: int, error_page: ErrorPage) -> None:
        self._app = app
        self._ring = ring
        self._per_minute = requests_per_minute
        self._error_page = error_page
        self._buckets = Buckets()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = scopes_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if not wanted and (wanted is None or scope["path"] not in GREETING):
            await self._app(scope, receive, send)
            return
        came = await self._admit(scope)
        caller, refusal = came.caller, came.refusal if wanted else None
        address = scope["client"][0] if scope.get("client") else "unknown"
        who = f"address:{address}" if caller is None else caller.ident
        counted = f"address:{network_of(address)}" if caller is None else who
        scope[CALLER], scope[LET_IN], scope[LOCKED] = who, caller, await self._ring.locked()
        if caller is not None and not caller.allows(wanted):
            refusal = self._lacks(scope, wanted)
        if came.cookie is not None:
            send = _with_cookie(send, came.cookie)
        limit = None if caller is None else caller.requests_per_minute
        per_minute = self._per_minute if limit is None else limit
        if not per_minute or not wanted:
            await (refusal or self._app)(scope, receive, send)
            return
        taken = self._buckets.take(counted, per_minute)
        if taken.retry_s:
            refusal = _too_many(taken)
        await (refusal or self._app)(scope, receive, _told(send, taken))

    async def _admit(self, scope: Scope) -> Admission:
        """Who a request comes from, or the refusal of one that shows nothing good."""
        if not await self._ring.locked():
            return Admission()
        headers = Headers(scope=scope)
        token = bearer_of(headers)
        if token is not None:
            key = await self._ring.verify(token)
            return Admission(refusal=_unauthorized(f"The API key {key}.")) if isinstance(key, str) else Admission(Caller(key))
        token = session_token(headers)
        visit = None if token is None else await self._ring.visit(token)
        if token is None or visit is None:
            return Admission(refusal=_sent_to_login(scope, headers, ended=token is not None))
        if scope["method"] in WRITING and not is_own(headers, scope["scheme"]):
            text = "A browser's session counts only for what this server's own pages send. A program needs an API key."
            return Admission(refusal=error_response(403, text, code="cross_site"))
        caller, prolonged = visit
        return Admission(caller, cookie=renewed(token, scope["scheme"]) if prolonged else None)

    def _lacks(self, scope: Scope, wanted: Scopes) -> Response:
        names = " or ".join(repr(str(name)) for name in sorted(wanted))
        if is_page(scope["method"], scope["path"]):
            return self._error_page(
                scope, 403, f"This page takes the scope {names}, which you do not have; an admin can give it to you."
            )
        return error_response(403, f"This key lacks the scope {names} for {scope['path']}.", code="insufficient_scope")


class InFlight:
    """Bounds what is under way, with 503 and retry-after: chat requests that wait, are sampled or streamed, and writes.

    A request that would write is refused before it costs anything while too many writes wait for the database; what was let in
    before ends.
    """

    def __init__(self, app: ASGIApp, limit: int, store: Store) -> None:
        self._app = app
        self._limit = limit
        self._store = store
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in WRITING or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        if self._store.is_busy:
            await from_error(StoreBusyError("too many writes wait"))(scope, receive, send)
            return
        if scope["path"] != CHAT or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._open >= self._limit:
            full = EngineError(f"{self._limit} answers are under way (serve.queue_limit); try again in a moment")
            await from_error(full)(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1


def bearer_of(headers: Headers) -> str | None:
    """The key that a request shows as a bearer."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    return (token.strip() or None) if kind.lower() == "bearer" else None


def _sent_to_login(scope: Scope, headers: Headers, *, ended: bool) -> Response:
    """A page leads to /login and back, also where a part of it asks (htmx follows ``hx-redirect``); all else is told."""
    text = "Your session has ended; log in again at /login." if ended else None
    text = text or "This server needs an API key: send it as `Authorization: Bearer sk-pairloop-…`, or log in at /login."
    if scope["method"] not in ("GET", "HEAD") or "authorization" in headers:
        return _unauthorized(text)
    if "hx-request" in headers:
        try:
            shown = urlsplit(headers.get("hx-current-url", ""))
        except ValueError:
            shown = urlsplit("/")
        return _unauthorized(text, {"hx-redirect": login_path(f"{shown.path}?{shown.query}" if shown.query else shown.path)})
    if not (is_page(scope["method"], scope["path"]) or is_for_a_person(scope)):
        return _unauthorized(text)
    query = scope["query_string"].decode("latin-1")
    return RedirectResponse(login_path(f"{scope['path']}?{query}" if query else scope["path"]), status_code=303)


def login_path(then: str) -> str:
    """/login, and from there on to ``then``, where that is more than the first page."""
    path = own_path(then)
    return "/login" if path in (None, "/") else f"/login?next={quote(str(path), safe='/')}"


def _unauthorized(text: str, more: Mapping[str, str] | None = None) -> Response:
    headers = {"www-authenticate": 'Bearer realm="pairloop"', **(more or {})}
    return error_response(401, text, code="invalid_api_key", headers=headers)


def _too_many(taken: Taken) -> Response:
    text = f"Rate limit reached: {taken.per_minute} requests per minute. Try again in {taken.retry_s} s."
    return error_response(429, text, kind="requests", code="rate_limit_exceeded", headers={"retry-after": str(taken.retry_s)})


def _told(send: Send, taken: Taken) -> Send:
    """The reply, with OpenAI's headers about the limit."""

    async def send_told(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers[LIMIT_HEADER] = str(taken.per_minute)
            headers["x-ratelimit-remaining-requests"] = str(taken.remaining)
            headers["x-ratelimit-reset-requests"] = f"{taken.reset_s:.3f}s"
        await send(message)

    return send_told


def _with_cookie(send: Send, cookie: str) -> Send:
    """The reply, with a cookie that lasts longer."""

    async def send_with_cookie(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).append("set-cookie", cookie)
        await send(message)

    return send_with_cookie
