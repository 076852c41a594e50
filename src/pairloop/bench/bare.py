"""The least that a server can do: reads a request and answers bytes that it was given, by the same HTTP server as ours.

``python -m pairloop.bench.bare replies.json`` says where it listens. What pairloop takes beyond this is what it adds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import uvicorn

from pairloop.web.server import listen, url_of


class Bare:
    """An ASGI application: ``whole`` is the body of a plain reply, ``events`` are those of a stream."""

    def __init__(self, whole: str, events: list[str]) -> None:
        self._whole = whole.encode()
        self._events = [event.encode() for event in events]

    async def __call__(self, _scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if json.loads(body).get("stream"):
            await self._send(send, [(b"content-type", b"text/event-stream; charset=utf-8")], self._events)
            return
        length = str(len(self._whole)).encode()
        await self._send(send, [(b"content-type", b"application/json"), (b"content-length", length)], [self._whole])

    async def _send(self, send: Any, headers: list[tuple[bytes, bytes]], pieces: list[bytes]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def main() -> None:
    app = Bare(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    listener = listen("127.0.0.1", 0)
    print(f"listening on {url_of(listener)}", flush=True)
    settings = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False, ws="none")
    uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    main()
