"""``Idempotency-Key``: a POST that is sent again is answered from the first reply, and done once. Plain ASGI.

The reply is durable before it is sent, and kept for a day. Kept are replies that succeeded; what was refused or failed may be
tried again under the same key, and streams are never kept. While the first request is under way, a second one waits for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from python_multipart.multipart import parse_options_header
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pairloop.store import Store, replies
from pairloop.store.replies import StoredReply
from pairloop.store.waiting import awaitable
from pairloop.web.access import CALLER
from pairloop.web.errors import error_response
from pairloop.web.headers import header

HEADER = b"idempotency-key"
LONGEST = 255
UPLOADS = b"multipart/"
_NOT_KEPT = ("/v1/keys",)
"""A reply that holds a secret is not written down."""
_STREAMED = "/export"
"""A reply that may be as large as a dataset; it changes nothing, so it may be asked for again."""
_KEPT_HEADERS = frozenset({"content-type", "x-pairloop-model-version"})


class Idempotency:
    """Answers a repeated POST from the store: 409 where the key was used for another body."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store
        self._under_way: dict[tuple[str, str], asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = header(scope, HEADER) if scope["type"] == "http" and scope["method"] == "POST" else None
        if key is None or not scope["path"].startswith("/v1/") or scope["path"].endswith(_STREAMED):
            await self._app(scope, receive, send)
            return
        refusal = _refusal(key, scope["path"])
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        asked = _Asked(scope, receive)
        if not asked.is_upload:
            await asked.read_ahead()
        about = (str(scope.get(CALLER, "")), key)
        while (ended := self._under_way.get(about)) is not None:
            await ended.wait()
        self._under_way[about] = ended = asyncio.Event()
        try:
            await self._answer(about, asked, scope, send)
        finally:
            del self._under_way[about]
            ended.set()

    async def _answer(self, about: tuple[str, str], asked: _Asked, scope: Scope, send: Send) -> None:
        stored = await asyncio.to_thread(self._read, about)
        if stored is None:
            await self._app(scope, asked.receive, self._keeping(about, asked, send))
            return
        await asked.drain()
        if stored.request_hash != asked.hash():
            text = f"The Idempotency-Key {about[1]!r} was used for another request; a new request needs a new key."
            await error_response(409, text, param="Idempotency-Key", code="idempotency_key_reused")(scope, asked.receive, send)
        else:
            sent = {**stored.headers, "idempotent-replayed": "true"}
            await Response(stored.body, status_code=stored.status, headers=sent)(scope, asked.receive, send)

    def _keeping(self, about: tuple[str, str], asked: _Asked, send: Send) -> Send:
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
                reply = _reply(asked.hash(), held)
                if self._store.redactor is not None:
                    reply = replace(reply, body=await asyncio.to_thread(self._store.redactor.reply, reply.body))
                # Admitted: what it is about is done, and must not be done again for want of its reply.
                await awaitable(self._store.submit(lambda c: replies.put(c, *about, reply), admitted=True))
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


class _Asked:
    """A request whose hash is known once its body was read: ahead where it is small, on its way to the route of an upload.

    The parts of an upload are divided by a text that a client draws anew for each attempt; it is left out.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        kind, options = parse_options_header(header(scope, b"content-type"))
        self.is_upload = kind.startswith(UPLOADS)
        self._boundary = options.get(b"boundary", b"") if self.is_upload else b""
        self._digest = hashlib.sha256(f"{scope['method']} {scope['path']}?".encode() + scope["query_string"])
        self._receive = receive
        self._ahead: list[Message] = []
        self._tail = b""
        self._ended = False

    async def receive(self) -> Message:
        """The next part of the body, whether it was read ahead or not."""
        return self._ahead.pop(0) if self._ahead else await self._next()

    async def read_ahead(self) -> None:
        """Read the whole body, and keep it for the route."""
        while not self._ended:
            self._ahead.append(await self._next())

    async def drain(self) -> None:
        """Read what is left of the body, and throw it away."""
        while not self._ended:
            await self._next()

    def hash(self) -> str:
        """The hash of what was read."""
        digest = self._digest.copy()
        digest.update(self._tail)
        return digest.hexdigest()

    async def _next(self) -> Message:
        message = await self._receive()
        self._ended = self._ended or not message.get("more_body", False)
        self._tail += message.get("body", b"")
        *whole, self._tail = self._tail.split(self._boundary) if self._boundary else [b"", self._tail]
        for part in whole:
            self._digest.update(part)
        # A boundary may be cut in two by the end of a message.
        sure = len(self._tail) - max(len(self._boundary) - 1, 0)
        if sure > 0:
            self._digest.update(self._tail[:sure])
            self._tail = self._tail[sure:]
        return message


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
