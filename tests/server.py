"""A real pairloop server for tests: uvicorn in a thread of this process, on a free loopback port, with the fake policy."""

from __future__ import annotations

import json
import os
import socket
import threading
from array import array
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import uvicorn
from openai import DefaultHttpxClient, OpenAI
from sqlalchemy import Connection
from tests.stores import open_beside, open_store

from pairloop.config import Config, parse_config
from pairloop.loop.cycle import Loop, ensure_base
from pairloop.loop.schedule import Scheduler
from pairloop.loop.serve import pool_of
from pairloop.policy.fake import FakePolicy, write_skill
from pairloop.policy.protocols import Policy
from pairloop.store import Store, cycles, duels, groups, versions
from pairloop.types import Alias, Cycle, CycleState, CycleStep, Duel, Group, Pool, Version, VersionKind
from pairloop.web.app import create_app
from pairloop.web.context import SchedulerLike
from pairloop.web.server import listen, url_of

START_S = STOP_S = 20.0
POLICY = "support-bot"


def fake_config(folder: Path, **sections: Mapping[str, Any]) -> Config:
    """The fake policy in ``folder``; ``sections`` override."""
    data: dict[str, Any] = {"state_dir": folder, "policy": {"model": "fake", "method": "full"}}
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return parse_config(data)


def user_of(pool: Pool, number: int = 0, gate_share: float = 0.2) -> str:
    """The ``number``-th user name that falls into ``pool``."""
    names = (f"user-{i}" for i in range(100_000))
    matching = (name for name in names if pool_of(name, gate_share) is pool)
    for _ in range(number):
        next(matching)
    return next(matching)


class World:
    """A store with version 0 as champion, and the fake policy; with what a cycle would do to them. ``with`` closes both."""

    def __init__(
        self, folder: Path, *, config: Config | None = None, policy: Policy | None = None, beside: World | None = None
    ) -> None:
        """``beside``: on that one's database and artifacts."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = config or fake_config(folder)
        opened = open_store(folder / "artifacts", self.config) if beside is None else open_beside(beside.store)
        self.store: Store = opened
        self.policy: Policy = policy or FakePolicy()
        ensure_base(self.store, self.policy, self.config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with closing(self.store), closing(self.policy):
            pass

    def group(self, group_id: str) -> Group:
        with self.store.reading() as c:
            group = groups.get(c, group_id)
        assert group is not None, f"no group {group_id}"
        return group

    def add_version(self, number: int, *, skill: int | None = None) -> Version:
        """Register a version of the fake policy, not yet loaded."""
        path = self.folder / f"version-{number}"
        path.mkdir()
        write_skill(path, number if skill is None else skill)
        version = Version(POLICY, number, VersionKind.FULL, str(path), f"hash-{number}", 0, None, None, datetime.now(UTC))
        self.store.write(lambda c: versions.insert(c, version))
        return version

    def alias(self, alias: Alias, number: int | None) -> None:
        self.store.write(lambda c: versions.set_alias(c, POLICY, alias, number))

    def open_duel(self, challenger: int) -> Duel:
        """A duel of version ``challenger`` (which must be registered) against the champion, in a cycle of its own."""
        now = datetime.now(UTC)

        def write(c: Connection) -> Duel:
            steps = tuple(
                CycleStep(state, {}, now)
                for state in (CycleState.BUILDING, CycleState.TRAINING, CycleState.CHECKING, CycleState.DUELLING)
            )
            cycle = Cycle(f"cycle_{challenger}", POLICY, challenger, 0, "test", now, steps)
            cycles.insert(c, cycle)
            champion = versions.alias(c, POLICY, Alias.CHAMPION) or 0
            duel = Duel(f"duel_{challenger}", cycle.cycle_id, POLICY, champion, challenger, now)
            duels.open(c, duel)
            versions.set_alias(c, POLICY, Alias.CHALLENGER, challenger)
            return duel

        return self.store.write(write)

    def close_duel(self, duel: Duel, state: CycleState, record: Mapping[str, Any] | None = None) -> Duel:
        now = datetime.now(UTC)

        def write(c: Connection) -> None:
            duels.close(c, duel.duel_id, now)
            versions.set_alias(c, POLICY, Alias.CHALLENGER, None)
            cycles.step(c, duel.cycle_id, CycleStep(state, record or {}, now))

        self.store.write(write)
        return replace(duel, closed_at=now)


class RunningServer(World):
    """Store, policy and server of one test; ``with`` starts and ends it. The store is open to the test."""

    def __init__(
        self,
        folder: Path,
        *,
        config: Config | None = None,
        policy: Policy | None = None,
        beside: World | None = None,
        scheduler: SchedulerLike | None = None,
        turning: bool = False,
    ) -> None:
        """``turning``: with a scheduler of its own, which runs cycles and fine-tuning jobs."""
        super().__init__(folder, config=config, policy=policy, beside=beside)
        if turning:
            scheduler = Scheduler(Loop(self.store, self.policy, self.config, f"{socket.gethostname()}:{os.getpid()}"))
        self._listener = listen("127.0.0.1", 0)
        self.url = url_of(self._listener)
        self.app = create_app(self.store, self.policy, self.config, scheduler)
        settings = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=2,
            ws="none",
            proxy_headers=False,
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, name="test-server")
        # Plain HTTP: a client that would verify loads certificates for a while.
        self.http = httpx.Client(base_url=self.url, timeout=20.0, trust_env=False, verify=False)
        self.openai = OpenAI(
            base_url=f"{self.url}/v1",
            api_key="any",
            max_retries=0,
            http_client=DefaultHttpxClient(timeout=20.0, trust_env=False, verify=False),
        )

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.http.get("/health/ready", timeout=START_S).status_code == 200
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with closing(self._listener), closing(self.http), closing(self.openai):
            self._server.should_exit = True
            self._thread.join(STOP_S)
            assert not self._thread.is_alive(), "the server did not end in time"
        super().__exit__(kind, error, trace)

    def post_chat(self, headers: Mapping[str, str]) -> httpx.Response:
        """The default chat request, with headers."""
        return self.http.post("/v1/chat/completions", json=chat_body(), headers=headers)

    def chat(self, **body: Any) -> httpx.Response:
        """POST /v1/chat/completions; model and messages have defaults."""
        return self.http.post("/v1/chat/completions", json=chat_body(**body))


def as_stored(group: Group) -> Group:
    """The group with its log-probs as float32, as the store keeps them."""
    completions = (replace(completion, logps=tuple(array("f", completion.logps))) for completion in group.completions)
    return replace(group, completions=tuple(completions))


def chat_body(**body: Any) -> dict[str, Any]:
    return {"model": POLICY, "messages": [{"role": "user", "content": "Where is my order?"}], **body}


def sse_chunks(text: str) -> list[dict[str, Any]]:
    """The parsed chunks of an event stream; asserts that it ends with [DONE]."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]
