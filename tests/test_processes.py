"""Two ``pairloop serve --no-scheduler`` and two ``pairloop worker`` on one database and artifact folder; one is killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from tests import waiting
from tests.postgres import missing, running_server

from pairloop.config import child_env, load_config
from pairloop.policy.fake import quality
from pairloop.scaffold import write_config
from pairloop.store import Store, cycles, doctor, groups, leases, versions
from pairloop.store.schema import feedback
from pairloop.types import Alias, Cycle, CycleState

NAME = "support-bot"
PATIENCE_S = 300.0
PROMOTIONS = 2
AT_WORK = {CycleState.BUILDING, CycleState.TRAINING, CycleState.CHECKING}


def on_postgres() -> Any:
    return pytest.param("postgres", marks=[pytest.mark.postgres, pytest.mark.skipif(bool(missing()), reason=str(missing()))])


@pytest.fixture(params=[pytest.param("sqlite", marks=pytest.mark.slow), on_postgres()])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'shared.sqlite'}"
        return
    with running_server() as server:
        yield server.blank()


def configured(tmp_path: Path, number: int, database: str) -> Path:
    """A process's own state directory; database and artifacts are everybody's."""
    settings: dict[str, dict[str, Any]] = {
        "policy": {"model": "fake", "name": NAME},
        "serve": {"gate_share": 0.5},
        "gate": {"max_picks": 300},
        "evaluate": {"prompts": 16},
        "schedule": {"min_pairs": 30, "poll": "1s", "lease": "5s"},
        "store": {"database": database, "artifacts": str(tmp_path / "artifacts")},
    }
    return write_config(tmp_path / f"process-{number}", settings)


@contextmanager
def started(config: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "pairloop", arguments[0], "--config", str(config), *arguments[1:]]
    with (config.parent / "log").open("w") as log:
        env = child_env(PYTHONUNBUFFERED="1")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, f"process {process.pid} ended before it said anything"
    return line


@dataclass
class Crowd:
    """Clients that ask one server and pick at the other, until they are told to stop."""

    urls: list[str]
    acknowledged: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def live(self, seed: int) -> None:
        rng = random.Random(seed)
        with ExitStack() as closing:
            servers = [closing.enter_context(httpx.Client(base_url=url, timeout=30.0, trust_env=False)) for url in self.urls]
            for number in count():
                if self.done.is_set():
                    return
                self._ask_and_pick(servers[number % 2], servers[(number + 1) % 2], f"pick-{seed}-{number}", rng)

    def _ask_and_pick(self, asked: httpx.Client, told: httpx.Client, feedback_id: str, rng: random.Random) -> None:
        user = f"user-{rng.randrange(10**9)}"
        body = {"model": NAME, "messages": [{"role": "user", "content": f"case {feedback_id}"}], "n": 2, "user": user}
        reply = asked.post("/v1/chat/completions", json=body)
        if reply.status_code != 200:
            self.refused.append(reply.text)
            return
        a, b = (quality(choice["message"]["content"]) for choice in reply.json()["choices"])
        preference = {"inference_id": reply.json()["id"], "chosen_index": int(b > a), "id": feedback_id, "latency_ms": 4_000}
        answer = told.post("/v1/preferences", json=preference)
        if answer.status_code == 201:
            self.acknowledged.append(feedback_id)
        else:
            self.refused.append(answer.text)


@contextmanager
def living(crowd: Crowd) -> Iterator[None]:
    threads = [threading.Thread(target=crowd.live, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        crowd.done.set()
        for thread in threads:
            thread.join(60)


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``."""
    return waiting.until(condition, patience_s=PATIENCE_S, why=lambda: f"that {what}")


def turning(store: Store, pids: set[int]) -> int | None:
    """The worker that is in the middle of a cycle."""
    with store.reading() as c:
        current, holder = cycles.current(c, NAME), leases.holder(c, f"cycle:{NAME}")
    if current is None or current.state not in AT_WORK or holder is None:
        return None
    host, _, pid = holder.partition("/")[0].rpartition(":")
    assert host == socket.gethostname()
    assert int(pid) in pids, "only workers turn the loop"
    return int(pid)


def promoted(store: Store) -> list[int]:
    with store.reading() as c:
        return [move.number for move in versions.promotions(c, NAME) if move.action == "promote"]


def test_two_servers_and_two_workers_share_a_loop_and_outlive_one_of_them(database: str, tmp_path: Path) -> None:
    paths = [configured(tmp_path, number, database) for number in range(4)]
    with ExitStack() as running:
        servers = [running.enter_context(started(path, "serve", "--no-scheduler", "--port", "0")) for path in paths[:2]]
        crowd = Crowd([first_line(server).rpartition(" ")[2] for server in servers])
        workers = [running.enter_context(started(path, "worker")) for path in paths[2:]]
        for worker in workers:
            first_line(worker)
        store = running.enter_context(Store.open(load_config(paths[0], env={})))
        with living(crowd):
            until(lambda: len(promoted(store)) >= 1, "a version is promoted")
            victim = until(lambda: turning(store, {worker.pid for worker in workers}), "a worker is in mid-cycle")
            os.kill(victim, signal.SIGKILL)
            gone = len(promoted(store))
            until(lambda: len(promoted(store)) >= max(PROMOTIONS, gone + 1), "the other worker goes on")
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)
        assert crowd.refused == []
        check_that_both_serve_the_champion(store, crowd.urls)
        check_evidence(store, crowd)
        print(f"{len(crowd.acknowledged)} picks acknowledged, {len(promoted(store))} promotions, worker {victim} killed")


def check_that_both_serve_the_champion(store: Store, urls: list[str]) -> None:
    with store.reading() as c:
        champion = versions.alias(c, NAME, Alias.CHAMPION)
    for url in urls:
        body = {"model": f"{NAME}@champion", "messages": [{"role": "user", "content": "Who are you?"}]}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30.0, trust_env=False)
        with store.reading() as c:
            group = groups.get(c, reply.json()["id"])
        assert group is not None
        assert [answer.version for answer in group.completions] == [champion]


def check_evidence(store: Store, crowd: Crowd) -> None:
    """No cycle beside another, no promotion twice, every acknowledged pick once, no invariant broken."""
    with store.reading() as c:
        turned: list[Cycle] = cycles.list_(c, NAME)[::-1]
        stored = Counter(c.execute(sa.select(feedback.c.feedback_id)).scalars())
    assert [cycle.number for cycle in turned] == list(range(1, len(turned) + 1))
    assert all(cycle.state.is_terminal for cycle in turned[:-1])
    for earlier, later in pairwise(turned):
        assert earlier.steps[-1].created_at <= later.created_at, "two cycles at a time"
    moves = promoted(store)
    assert len(moves) == len(set(moves)) == sum(cycle.state is CycleState.PROMOTED for cycle in turned)
    assert {pick: stored[pick] for pick in crowd.acknowledged} == dict.fromkeys(crowd.acknowledged, 1)
    assert doctor.check(store) == []
