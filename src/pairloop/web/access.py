"""Who may come in: keys, their scopes, requests per minute, and answers under way. Plain ASGI, before any body is read."""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pairloop.errors import EngineError, StoreBusyError
from pairloop.store import Store
from pairloop.store.keys import Key
from pairloop.web.errors import error_response, from_error
from pairloop.web.keyring import KeyRing
from pairloop.web.limits import Buckets, Taken
from pairloop.web.scopes import scopes_of
from pairloop.web.sites import site_of

KEY_COOKIE = "pairloop_key"
CALLER = "pairloop.caller"
"""Where the scope of a request holds who sent it: a key's id, or an address."""
KEY = "pairloop.key"
"""Where it holds the `Key` itself; None while the server asks for none."""
CHAT = "/v1/chat/completions"
WRITING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
LIMIT_HEADER = "x-ratelimit-limit-requests"


class Access:
    """Lets a request in with the right key (once there are keys) and within its requests per minute.

    401 without a good key, 403 where it lacks the scope, 429 with retry-after beyond the limit.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing, requests_per_minute: int) -> None:
        self._app = app
        self._ring = ring
        self._per_minute = requests_per_minute
        self._buckets = Buckets()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = scopes_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if not wanted:
            await self._app(scope, receive, send)
            return
        key, refusal = await self._admit(scope)
        if key is not None and not key.allows(wanted):
            names = " or ".join(repr(str(name)) for name in sorted(wanted))
            refusal = error_response(403, f"This key lacks the scope {names} for {scope['path']}.", code="insufficient_scope")
        address = scope["client"][0] if scope.get("client") else "unknown"
        caller = f"key:{key.key_id}" if key is not None else f"address:{address}"
        scope[CALLER], scope[KEY] = caller, key
        per_minute = self._per_minute if key is None or key.requests_per_minute is None else key.requests_per_minute
        if not per_minute:
            await (refusal or self._app)(scope, receive, send)
            return
        taken = self._buckets.take(caller, per_minute)
        if taken.retry_s:
            refusal = _too_many(taken)
        await (refusal or self._app)(scope, receive, _told(send, taken))

    async def _admit(self, scope: Scope) -> tuple[Key | None, Response | None]:
        """The key of a request, or the refusal of one that has none; neither while there are no keys."""
        if not await self._ring.locked():
            return None, None
        headers = Headers(scope=scope)
        token = token_of(headers)
        if token is None:
            if scope["path"] == "/" and "authorization" not in headers:
                return None, RedirectResponse("/login", status_code=303)
            text = "This server needs an API key: send it as `Authorization: Bearer sk-pairloop-…`, or log in at /login."
            return None, _unauthorized(text)
        key = await self._ring.verify(token)
        return (None, _unauthorized(f"The API key {key}.")) if isinstance(key, str) else (key, None)


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


def token_of(headers: Headers) -> str | None:
    """The key that a request carries: a bearer's, or the page's cookie, which counts only for the page's own origin."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    origin = headers.get("origin")
    if origin is not None and site_of(origin) != headers.get("host"):
        return None
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(KEY_COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel is not None and morsel.value else None


def _unauthorized(text: str) -> Response:
    return error_response(401, text, code="invalid_api_key", headers={"www-authenticate": 'Bearer realm="pairloop"'})


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
