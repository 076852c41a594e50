"""``Idempotency-Key``: a POST that is sent again is answered from the first reply, and done once. Plain ASGI.

The reply is durable before it is sent, and kept for a day. Kept are replies that succeeded; what was refused or failed may be
tried again under the same key, and streams are never kept. While the first request is under way, a second one waits for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pairloop.store import Store, replies
from pairloop.store.replies import StoredReply
from pairloop.web.access import CALLER
from pairloop.web.errors import error_response

HEADER = "idempotency-key"
LONGEST = 255
UPLOADS = "multipart/"
_NOT_KEPT = ("/v1/keys",)
"""A reply that holds a secret is not written down."""
_KEPT_HEADERS = frozenset({"content-type", "x-pairloop-model-version"})


class Idempotency:
    """Answers a repeated POST from the store: 409 where the key was used for another body."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store
        self._under_way: dict[tuple[str, str], asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" and scope["method"] == "POST" else Headers()
        if HEADER not in headers or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        key = headers[HEADER]
        refusal = _refusal(key, scope["path"])
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        request_hash, receive = await _hashed(scope, headers, receive)
        about = (str(scope.get(CALLER, "")), key)
        while (ended := self._under_way.get(about)) is not None:
            await ended.wait()
        self._under_way[about] = ended = asyncio.Event()
        try:
            await self._answer(about, request_hash, scope, receive, send)
        finally:
            del self._under_way[about]
            ended.set()

    async def _answer(self, about: tuple[str, str], request_hash: str, scope: Scope, receive: Receive, send: Send) -> None:
        stored = await asyncio.to_thread(self._read, about)
        if stored is None:
            await self._app(scope, receive, self._keeping(about, request_hash, send))
        elif stored.request_hash != request_hash:
            text = f"The Idempotency-Key {about[1]!r} was used for another request; a new request needs a new key."
            await error_response(409, text, param="Idempotency-Key", code="idempotency_key_reused")(scope, receive, send)
        else:
            sent = {**stored.headers, "idempotent-replayed": "true"}
            await Response(stored.body, status_code=stored.status, headers=sent)(scope, receive, send)

    def _keeping(self, about: tuple[str, str], request_hash: str, send: Send) -> Send:
        """Holds a reply back until it is stored; one that is not to be kept passes as it comes."""
        held: list[Message] = []
        keeps = False

        async def send_kept(message: Message) -> None:
            nonlocal keeps
            if message["type"] == "http.response.start":
                keeps = 200 <= message["status"] < 300 and not _is_stream(message["headers"])
            if not keeps:
                await send(message)
                return
            held.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                reply = _reply(request_hash, held)
                await asyncio.wrap_future(self._store.submit(lambda c: replies.put(c, *about, reply)))
                for part in held:
                    await send(part)

        return send_kept

    def _read(self, about: tuple[str, str]) -> StoredReply | None:
        with self._store.reading() as c:
            return replies.get(c, *about, now=datetime.now(UTC))


def _refusal(key: str, path: str) -> Response | None:
    if not 1 <= len(key) <= LONGEST:
        text = f"Idempotency-Key has {len(key)} characters; it takes 1 to {LONGEST}."
        return error_response(400, text, param="Idempotency-Key", code="invalid_value")
    if path.startswith(_NOT_KEPT):
        text = f"{path} takes no Idempotency-Key: its reply holds a secret, which is not stored."
        return error_response(400, text, param="Idempotency-Key", code="unsupported_parameter")
    return None


async def _hashed(scope: Scope, headers: Headers, receive: Receive) -> tuple[str, Receive]:
    """A hash of the request, and a ``receive`` that still gives its body.

    Of an upload only the length counts: its parts are divided by a text that a client draws anew for each attempt.
    """
    digest = hashlib.sha256(f"{scope['method']} {scope['path']}?".encode() + scope["query_string"])
    if headers.get("content-type", "").startswith(UPLOADS):
        digest.update(headers.get("content-length", "").encode())
        return digest.hexdigest(), receive
    read: list[Message] = []
    while not read or (read[-1]["type"] == "http.request" and read[-1].get("more_body", False)):
        read.append(await receive())
        digest.update(read[-1].get("body", b""))

    async def receive_again() -> Message:
        return read.pop(0) if read else await receive()

    return digest.hexdigest(), receive_again


def _is_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def _reply(request_hash: str, held: list[Message]) -> StoredReply:
    kept = {name.decode("latin-1"): value.decode("latin-1") for name, value in held[0]["headers"]}
    body = b"".join(message.get("body", b"") for message in held[1:])
    headers = {name: value for name, value in kept.items() if name in _KEPT_HEADERS}
    return StoredReply(request_hash, held[0]["status"], headers, body, datetime.now(UTC), _subject(body))


def _subject(body: bytes) -> str | None:
    """The ``id`` of a reply that is an object with one."""
    try:
        told = json.loads(body)
    except ValueError:
        return None
    subject = told.get("id") if isinstance(told, dict) else None
    return subject if isinstance(subject, str) and len(subject) <= LONGEST else None
