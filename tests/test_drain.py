"""SIGTERM to a real server with answers under way: they end whole, or are told, and nothing acknowledged is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from tests.server import chat_body, sse_chunks
from tests.waiting import until

from pairloop.cli import pairloop
from pairloop.config import load_config, parse_config
from pairloop.demo.server import start_server
from pairloop.scaffold import starter_recipe, write_config
from pairloop.store import Store, groups, runs
from pairloop.types import Run, RunStatus

pytestmark = pytest.mark.slow
WAIT_S = 60.0


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    http: httpx.Client
    gate: Path
    settings: dict[str, Any]
    log: Path

    def stream(self, said: threading.Event) -> str:
        """The whole of a streamed reply; ``said`` once it has begun to speak."""
        text = ""
        with self.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as reply:
            for chunk in reply.iter_text():
                text += chunk
                said.set()
        return text

    def ready(self) -> int:
        return self.http.get("/health/ready").status_code

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def running(folder: Path, **serve: Any) -> Iterator[Running]:
    hook = {"name": "ops", "url": "http://127.0.0.1:9", "secret_env": "HOOK_KEY"}
    settings = {
        "state_dir": str(folder / "state"),
        "policy": {"model": "fake", "method": "full"},
        "serve": {"port": 0, **serve},
        "webhooks": {"endpoints": [hook]},
    }
    folder.mkdir(exist_ok=True)
    path, gate, log = folder / "settings.json", folder / "gate", folder / "server.log"
    path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "tests.waiting_server", str(path), str(gate)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HOOK_KEY": "any"}
    root = Path(__file__).parent.parent
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env, cwd=root) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().decode().strip().rsplit(" ", 1)[1]
            limits = httpx.Limits(max_keepalive_connections=0)
            with httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False, limits=limits) as http:
                yield Running(process, http, gate, settings, log)
        finally:
            process.kill()


def abandoned(server: Running) -> dict[str, bool]:
    """Whether each group was, once the server has ended; no lease is held any more."""
    with Store.open(parse_config(server.settings)) as store, store.reading() as c:
        assert c.execute(sa.text("SELECT count(*) FROM leases WHERE owner IS NOT NULL")).scalar() == 0
        found = (groups.get(c, group_id) for group_id in c.execute(sa.text("SELECT group_id FROM groups")).scalars())
        return {group.group_id: group.is_abandoned for group in found if group is not None}


def test_answers_under_way_end_whole_while_the_server_says_that_it_is_not_ready(tmp_path: Path) -> None:
    with running(tmp_path, drain_delay="6s", drain="30s") as server, ThreadPoolExecutor(4) as pool:
        picked = server.http.post("/v1/chat/completions", json=chat_body(n=2)).json()["id"]
        pick = {"inference_id": picked, "chosen_index": 0}
        assert server.http.post("/v1/preferences", json=pick).status_code == 201
        said = threading.Event()
        streams: list[Future[str]] = [pool.submit(server.stream, said) for _ in range(3)]
        assert said.wait(WAIT_S)
        assert server.ready() == 200
        server.stop()
        until(lambda: server.ready() == 503)
        late = pool.submit(server.stream, threading.Event())  # still taken: the load balancer has not seen it yet
        assert "pairloop_draining 1.0" in server.http.get("/metrics").text
        server.gate.touch()
        answered = {sse_chunks(stream.result(WAIT_S))[0]["id"] for stream in (*streams, late)}
        assert server.process.wait(WAIT_S) == 0, server.log.read_text()
        with pytest.raises(httpx.ConnectError):
            server.ready()
    found = abandoned(server)
    assert found == {**dict.fromkeys(answered, False), picked: False}
    with Store.open(parse_config(server.settings)) as store, store.reading() as c:
        assert c.execute(sa.text("SELECT group_id FROM feedback")).scalars().all() == [picked]


def test_answers_that_do_not_end_are_told_so(tmp_path: Path) -> None:
    with running(tmp_path, drain="1s") as server, ThreadPoolExecutor(2) as pool:
        said = threading.Event()
        stream = pool.submit(server.stream, said)
        assert said.wait(WAIT_S)
        whole = pool.submit(server.http.post, "/v1/chat/completions", json=chat_body())
        until(lambda: "pairloop_queue 2.0" in server.http.get("/metrics").text)
        server.stop()
        assert server.process.wait(WAIT_S) == 0, server.log.read_text()
        events = [line.removeprefix("data: ") for line in stream.result(WAIT_S).split("\n\n") if line]
        refused = whole.result(WAIT_S)
    assert "error" in json.loads(events[-1])
    assert "stopping" in json.loads(events[-1])["error"]["message"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert refused.headers["retry-after"]
    assert set(abandoned(server).values()) == {True}
    assert "2 answers had not ended" in server.log.read_text()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with running(tmp_path, drain="10m") as server, ThreadPoolExecutor(1) as pool:
        said = threading.Event()
        stream = pool.submit(server.stream, said)
        assert said.wait(WAIT_S)
        server.stop()
        until(lambda: server.ready() == 503)  # two signals that come together are one
        assert server.process.poll() is None
        server.stop()
        assert server.process.wait(WAIT_S) == 1
        with pytest.raises(httpx.HTTPError):
            stream.result(WAIT_S)
    assert "a second signal" in server.log.read_text()


def test_a_training_keeps_its_step_and_its_lease_is_free(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = starter_recipe()
    settings["train"] |= {"checkpoint_every": 1_000, "epochs": 50}
    settings["schedule"] = {"min_pairs": 20}
    path = write_config(tmp_path / "bot", settings)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Q{n}", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(60)))
    assert CliRunner().invoke(pairloop, ["data", "import", str(rows), "--config", str(path)]).exit_code == 0
    server = start_server(path, log=tmp_path / "server.log")
    try:
        until(lambda: (run := _run_of(path)) and run.progress.get("step", 0) >= 2, patience_s=WAIT_S, why=server.log.read_text)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT_S) == 0, server.log.read_text()
    finally:
        server.stop()
    with Store.open(load_config(path, env={})) as store, store.reading() as c:
        assert c.execute(sa.text("SELECT count(*) FROM leases WHERE owner IS NOT NULL")).scalar() == 0
        (stopped,) = runs.list_(c, "support-bot")
        assert stopped.status is RunStatus.RUNNING, "to be taken up from its checkpoint"
    assert list((path.parent / "runs").glob("*/checkpoints/step-*"))


def _run_of(path: Path) -> Run | None:
    config = load_config(path, env={})
    with Store.open(config) as store, store.reading() as c:
        return next(iter(runs.list_(c, config.policy.name)), None)
