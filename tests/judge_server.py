"""A judge on loopback: an OpenAI-compatible chat endpoint whose verdicts are a function of the two answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, str], "str | int | bytes"]
"""What the judge answers to the answers shown as A and B: a text, an HTTP status, or a raw body."""


@contextmanager
def judge_server(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible endpoint whose judge is ``reply``; yields its base URL and the requests it got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            requests.append({"path": self.path, "authorization": self.headers["authorization"], **body})
            question = body["messages"][-1]["content"]
            _, a, b = (
                question.removesuffix("\n\n--- end ---")
                .replace("\n\n--- answer B ---\n", "\n\n--- answer A ---\n")
                .split("\n\n--- answer A ---\n")
            )
            said = reply(a, b)
            content = said if isinstance(said, bytes) else json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(said if isinstance(said, int) else 200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def longer_wins(a: str, b: str) -> str:
    if len(a) == len(b):
        return "They are alike.\n[[TIE]]"
    return "Reasons.\n[[A]]" if len(a) > len(b) else "Reasons.\n[[b]]"
