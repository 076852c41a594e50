"""A real server whose answers wait midway until a file appears: ``python -m tests.waiting_server SETTINGS.json GATE``."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from pairloop.config import parse_config
from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import SampleRequest, TokenEvent
from pairloop.telemetry import logs
from pairloop.types import Completion
from pairloop.web import server

SAID_FIRST = 5


class Waits(FakePolicy):
    """Says a few tokens of each streamed answer, and the rest once ``gate`` is there."""

    def __init__(self, gate: Path) -> None:
        super().__init__()
        self._gate = gate

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        said, inner, pause = 0, request.on_token, threading.Event()

        def slowly(event: TokenEvent) -> None:
            nonlocal said
            said += 1
            while said > SAID_FIRST and not self._gate.exists() and not self._closed:
                pause.wait(0.02)
            if inner is not None:
                inner(event)

        return super().sample(request if inner is None else replace(request, on_token=slowly))


if __name__ == "__main__":
    config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
    logs.setup(config.log, background=True)
    vars(server)["open_policy"] = lambda _config, **_fetch: Waits(Path(sys.argv[2]))
    server.run(config)
