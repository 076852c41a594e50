"""``Idempotency-Key``: a POST that is sent again is answered from the first reply, and done once. Plain ASGI.

The reply is durable before it is sent, and kept for a day. Kept are replies that succeeded; what was refused or failed may be
tried again under the same key, and streams are never kept. Of an answer with personal data only that it was given is kept, and
told with a 409. While the first request is under way, here or at another server on the same database, a second one waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from time import monotonic

from python_multipart.multipart import parse_options_header
from sqlalchemy import Connection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pairloop.loop.cycle import is_gone, owning
from pairloop.redaction import Redactor
from pairloop.store import Store, new_id, replies
from pairloop.store.replies import StoredReply
from pairloop.store.waiting import awaitable
from pairloop.web.callers import CALLER
from pairloop.web.errors import error_response
from pairloop.web.headers import header

HEADER = b"idempotency-key"
LONGEST = 255
UPLOADS = b"multipart/"
_NOT_KEPT = ("/v1/keys", "/v1/accounts")
"""A reply that holds a secret is not written down."""
_STREAMED = "/export"
"""A reply that may be as large as a dataset; it changes nothing, so it may be asked for again."""
PATIENCE_S = 60.0
"""How long a request waits for the same one at another server."""
LOOK_EVERY_S = 0.1
LOST = timedelta(minutes=10)
"""A request that another machine began so long ago, and that is not answered, will not be."""
_REFUSAL_HEADERS = frozenset({"content-type", "x-should-retry"})
_KEPT_HEADERS = frozenset({"content-type", "x-pairloop-model-version"})


class Idempotency:
    """Answers a repeated POST from the store: 409 where the key was used for another body."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store
        self._under_way: dict[tuple[str, str], asyncio.Event] = {}
        self._process = f"{socket.gethostname()}:{os.getpid()}"

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
        owner = f"{self._process}/{new_id('request')}"
        with owning(owner):
            stored = await self._take(about, owner)
            if stored is None:
                await self._do(about, owner, asked, scope, send)
                return
        await asked.drain()
        if stored.status == replies.UNDER_WAY:
            text = f"The request with the Idempotency-Key {about[1]!r} is still under way; ask again in a moment."
            again = {"retry-after": "1"}
            refusal = error_response(409, text, param="Idempotency-Key", code="idempotency_key_in_use", headers=again)
            await refusal(scope, asked.receive, send)
        elif stored.request_hash != asked.hash():
            text = f"The Idempotency-Key {about[1]!r} was used for another request; a new request needs a new key."
            await error_response(409, text, param="Idempotency-Key", code="idempotency_key_reused")(scope, asked.receive, send)
        else:
            sent = {**stored.headers, "idempotent-replayed": "true"}
            await Response(stored.body, status_code=stored.status, headers=sent)(scope, asked.receive, send)

    async def _do(self, about: tuple[str, str], owner: str, asked: _Asked, scope: Scope, send: Send) -> None:
        keeping = _Keeping(self._store, about, asked, send)
        try:
            await self._app(scope, asked.receive, keeping.send)
        finally:
            if not keeping.is_kept:
                self._store.submit(lambda c: replies.release(c, *about, owner), admitted=True)

    async def _take(self, about: tuple[str, str], owner: str) -> StoredReply | None:
        """None where the request is ours to do; else the kept reply, or after a while that it is still under way elsewhere."""
        until_s = monotonic() + PATIENCE_S
        while True:
            take = partial(_take, about=about, owner=owner)
            found = await awaitable(self._store.submit(take))
            if found is None or found.status != replies.UNDER_WAY or monotonic() > until_s:
                return found
            await asyncio.sleep(LOOK_EVERY_S)


class _Keeping:
    """Holds a reply back until it is stored; one that is not to be kept passes as it comes."""

    def __init__(self, store: Store, about: tuple[str, str], asked: _Asked, send: Send) -> None:
        self._store, self._about, self._asked, self._send = store, about, asked, send
        self._held: list[Message] = []
        self._keeps = False
        self.is_kept = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._keeps = 200 <= message["status"] < 300 and not _is_stream(message["headers"])
        if not self._keeps:
            await self._send(message)
            return
        self._held.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            reply = _reply(self._asked.hash(), self._held)
            if self._store.redactor is not None:
                reply = await asyncio.to_thread(_redacted, reply, self._store.redactor)
            # Admitted: what it is about is done, and must not be done again for want of its reply.
            await awaitable(self._store.submit(lambda c: replies.put(c, *self._about, reply), admitted=True))
            self.is_kept = True
            for part in self._held:
                await self._send(part)


def _take(c: Connection, about: tuple[str, str], owner: str) -> StoredReply | None:
    return replies.take(c, *about, owner, now=datetime.now(UTC), is_gone=_is_gone)


def _is_gone(found: StoredReply) -> bool:
    return is_gone(found.headers["owner"]) or found.created_at <= datetime.now(UTC) - LOST


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


def _redacted(reply: StoredReply, redactor: Redactor) -> StoredReply:
    """The reply as it may be stored. Of one whose answers would change only that it was done: a client may act on an answer,
    call a function with it, and must not get one that nobody gave."""
    kept = redactor.reply(reply.body)
    if kept == reply.body or _answers(kept) == _answers(reply.body):
        return replace(reply, body=kept)
    told = f"This request was done, as {reply.subject or 'asked'}; its reply was not kept, for it held what is not stored here."
    refusal = error_response(409, told, param="Idempotency-Key", code="reply_not_kept")
    headers = {name: value for name, value in refusal.headers.items() if name in _REFUSAL_HEADERS}
    return replace(reply, status=409, headers=headers, body=bytes(refusal.body))


def _answers(body: bytes) -> object:
    """The ``choices`` of a reply."""
    told = json.loads(body)
    return told.get("choices") if isinstance(told, dict) else None


def _subject(body: bytes) -> str | None:
    """The group whose texts a reply shows, or else its ``id``, where it is an object with one: who deletes that deletes it."""
    try:
        told = json.loads(body)
    except ValueError:
        return None
    if not isinstance(told, dict):
        return None
    item = told.get("item")
    subject = told.get("inference_id") or (item.get("inference_id") if isinstance(item, dict) else None) or told.get("id")
    return subject if isinstance(subject, str) and len(subject) <= LONGEST else None
