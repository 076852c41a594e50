"""A vLLM-compatible server on loopback: the bodies of a real one, the answers of the fake policy, and faults to plant.

The shapes of chunks, lists and errors are those recorded from vLLM (tests/record_vllm.py); ids, log-probs and names are filled
in. An adapter is a folder with the fake policy's ``fake.json``.
"""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import SampleRequest
from pairloop.types import BASE_VERSION, Completion, SamplingParams, Version, VersionKind

RECORDED = Path(__file__).parent / "recorded" / "vllm"


def recorded(name: str) -> dict[str, Any]:
    """A recorded exchange: its request and its response."""
    found: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    return found


def recorded_events(name: str) -> list[str]:
    """The data of each event of a recorded stream, without the last ``[DONE]``."""
    lines = recorded(name)["response"]["body"].split("\n\n")
    return [data for line in lines if (data := line.removeprefix("data: ").strip()) and data != "[DONE]"]


@dataclass
class Faults:
    """What goes wrong: each fault holds until it is taken back."""

    status: int | None = None
    """Answer completions with this status."""
    body: bytes | None = None
    """Answer completions with this body instead of events."""
    spoil: dict[str, Any] = field(default_factory=dict)
    """Fields that replace those of each choice (``token_ids``, ``logprobs`` …); None takes them out."""
    break_after: int | None = None
    """Drop the connection after so many chunks."""
    offset: float = 0.0
    """Nats added to every log-prob."""
    stale: bool = False
    """Adapters answer as the base does."""
    unlisted: bool = False
    """Adapters are taken, but not listed."""
    load: str | None = None
    """Answer the loading of adapters with this recorded exchange."""
    load_status: int | None = None
    sick: bool = False
    """Fail the health check, and go on answering."""
    hangs: bool = False
    """Send one chunk, and then nothing until the client goes away."""


class VllmServer:
    """One server. ``requests`` holds (path, body) of every POST; ``gate`` is waited for before each completion."""

    def __init__(self, *, model: str = "tiny", max_model_len: int = 256, key: str | None = None) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.key = key
        self.faults = Faults()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.adapters: dict[str, tuple[int, str]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        """Released once for each completion request that arrives."""
        self.hung_up = threading.Event()
        """Set when a client went away from a request that ``hangs``."""
        self._numbers = count(1)
        self._policy = FakePolicy(max_context=max_model_len)
        self._connections: set[socket.socket] = set()
        self._listen(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.gate.set()
        self.die()
        self._policy.close()

    def _listen(self, port: int) -> None:
        handler = type("Handler", (_Handler,), {"vllm": self})
        self._http = _Server(("127.0.0.1", port), handler)
        self._port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
        self._thread.start()

    def die(self) -> None:
        """As after kill -9: nobody listens, and every connection is cut."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def rise(self) -> None:
        """Started again on the same port, as it was configured: without adapters, without faults."""
        self.adapters.clear()
        self.faults = Faults()
        self._listen(self._port)

    def asked_as(self, name: str) -> int:
        """How many completions were asked of the model ``name``."""
        return sum(path == "/v1/completions" and body["model"] == name for path, body in list(self.requests))

    # -- what it answers --------------------------------------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        whole = json.loads(recorded("models_adapter")["response"]["body"])
        base, adapter = whole["data"]
        entries = [base | {"id": self.model, "max_model_len": self.max_model_len}]
        if not self.faults.unlisted:
            entries += [adapter | {"id": name, "root": path, "parent": self.model} for name, (_, path) in self.adapters.items()]
        return {**whole, "data": entries}

    def load(self, body: dict[str, Any]) -> tuple[int, str]:
        if self.faults.load_status is not None:
            return self.faults.load_status, '{"error": {"message": "out of memory"}}'
        if self.faults.load is not None:
            return _recorded_reply(self.faults.load)
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return _recorded_reply("load_again")
        if not (Path(path) / "fake.json").is_file():
            return _recorded_reply("load_missing")
        number = next(self._numbers)
        self._policy.load(adapter_version(number, Path(path)))
        self.adapters[name] = (number, path)
        return _recorded_reply("load")

    def unload(self, body: dict[str, Any]) -> tuple[int, str]:
        found = self.adapters.pop(body["lora_name"], None)
        return _recorded_reply("unload_again" if found is None else "unload")

    def complete(self, body: dict[str, Any]) -> tuple[int, str] | Iterator[str]:
        if body["model"] == self.model:
            number = BASE_VERSION
        elif body["model"] in self.adapters:
            number = self.adapters[body["model"]][0]
        else:
            return _recorded_reply("unknown_model")
        if body["temperature"] == 0 and body["n"] > 1:
            return _recorded_reply("greedy_two")
        params = SamplingParams(body["max_tokens"], body["temperature"], body["top_p"], tuple(body["stop"]), body.get("seed"))
        request = SampleRequest(tuple(body["prompt"]), BASE_VERSION if self.faults.stale else number, body["n"], params)
        return self._events(body, self._policy.sample(request).result(10))

    def _events(self, body: dict[str, Any], completions: tuple[Completion, ...]) -> Iterator[str]:
        """One chunk per token, those of the choices in turn, as the real one sends them."""
        shape = json.loads(recorded_events("top")[0])
        for place in range(max(len(completion.token_ids) for completion in completions)):
            for index, completion in enumerate(completions):
                if place >= len(completion.token_ids):
                    continue
                chunk = copy.deepcopy(shape)
                choice = chunk["choices"][0]
                token, logp = completion.token_ids[place], completion.logps[place] + self.faults.offset
                is_last = place + 1 == len(completion.token_ids)
                choice |= {"index": index, "token_ids": [token], "text": "?"}
                choice["finish_reason"] = completion.finish_reason.value if is_last else None
                choice["prompt_token_ids"] = body["prompt"] if place == 0 else None
                choice["logprobs"] |= {"token_logprobs": [logp], "top_logprobs": [{f"token_id:{token}": logp}]}
                for key, value in self.faults.spoil.items():
                    choice[key] = value
                yield json.dumps({**chunk, "model": body["model"]})


def _recorded_reply(name: str) -> tuple[int, str]:
    response = recorded(name)["response"]
    return response["status"], response["body"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def handle_error(self, *_: Any) -> None:
        """Connections are cut on purpose here."""


class _Handler(BaseHTTPRequestHandler):
    vllm: VllmServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.vllm._connections.add(self.connection)

    def finish(self) -> None:
        self.vllm._connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(503 if self.vllm.faults.sick else 200, "")
        elif not self._is_allowed():
            self._reply(401, '{"error": "Unauthorized"}')
        elif self.path == "/v1/models":
            self._reply(200, json.dumps(self.vllm.models()))
        else:
            self._reply(*_recorded_reply("no_route"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._is_allowed():
            return self._reply(401, '{"error": "Unauthorized"}')
        self.vllm.requests.append((self.path, body))
        if self.path == "/v1/load_lora_adapter":
            return self._reply(*self.vllm.load(body))
        if self.path == "/v1/unload_lora_adapter":
            return self._reply(*self.vllm.unload(body))
        assert self.path == "/v1/completions", self.path
        self.vllm.arrived.release()
        assert self.vllm.gate.wait(20)
        faults = self.vllm.faults
        if faults.status is not None:
            return self._reply(faults.status, '{"error": {"message": "the engine is dead"}}')
        if faults.body is not None:
            return self._reply(200, faults.body.decode())
        answer = self.vllm.complete(body)
        return self._reply(*answer) if isinstance(answer, tuple) else self._stream(answer, faults)

    def _stream(self, events: Iterator[str], faults: Faults) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for sent, data in enumerate(events):
            if sent == faults.break_after:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self._chunk(f"data: {data}\n\n")
            if faults.hangs:
                with suppress(OSError):
                    self.connection.recv(1)  # empty when the client closes
                self.vllm.hung_up.set()
                self.close_connection = True
                return
        self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _reply(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _is_allowed(self) -> bool:
        return self.vllm.key is None or self.headers["authorization"] == f"Bearer {self.vllm.key}"

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


def adapter_version(number: int, path: Path, name: str = "support-bot") -> Version:
    """An adapter of the fake policy: a folder with its ``fake.json``."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Version(name, number, VersionKind.ADAPTER, str(path), f"{number:08x}" * 8, number - 1, None, None, at)


@contextmanager
def fleet(n: int, **options: Any) -> Iterator[list[VllmServer]]:
    """``n`` servers that end with the block."""
    servers: list[VllmServer] = []
    try:
        servers += [VllmServer(**options) for _ in range(n)]
        yield servers
    finally:
        for server in servers:
            server.__exit__(None, None, None)
