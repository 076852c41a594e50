"""kill -9 of the server and of the training child at random moments, under the demo's customers.

The cycles go on to an end, every acknowledged pick is there exactly once, and no half-written version is ever served.
"""

from __future__ import annotations

import asyncio
import random
import signal
import socket
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
from tests.ports import hold_port, number_of

from pairloop.config import load_config
from pairloop.demo.run import run_cycle
from pairloop.demo.server import ServerProcess, start_server
from pairloop.demo.traffic import Crowd, Shop, Tally, open_shop, send
from pairloop.scaffold import starter_recipe, write_config
from pairloop.starter.customers import Behaviour
from pairloop.store import Store, cycles, doctor, groups, versions
from pairloop.types import CycleState, Pool, VersionKind

KILLS = 20
CUSTOMERS = 96
PATIENCE_S = 900.0
ENDS = {CycleState.PROMOTED, CycleState.HELD, CycleState.REJECTED}


class Silent:
    def stage(self, text: str) -> None: ...

    def bar(self, text: str, done: int, of: int) -> None: ...


@dataclass
class Executioner:
    """Keeps a server running on one port, and kills it or its training child at random moments.

    Never the child twice in a row: three deaths without a checkpoint between them end a run by rule, as they should.
    """

    config: Path
    log: Path
    rng: random.Random
    place: socket.socket
    server: ServerProcess
    kills: Counter[str] = field(default_factory=Counter)
    last: str = ""

    @classmethod
    def start(cls, config: Path, log: Path, seed: int) -> Executioner:
        place = hold_port()
        return cls(config, log, random.Random(seed), place, start_server(config, port=number_of(place), log=log))

    async def work(self, shop: Shop) -> None:
        """KILLS kills, each a random while after the server was ready again; and one of the child where none was among them."""
        while self.kills.total() < KILLS or not self.kills["child"]:
            await asyncio.sleep(self.rng.uniform(0.05, 2.5))
            child = self._training_child()
            if child is not None and self.last != "child":
                child.send_signal(signal.SIGKILL)
                self._note("child")
                continue
            if self.kills.total() >= KILLS:
                continue
            self.server.process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self.server.process.wait, 30)
            self._note("server")
            self.server = await asyncio.to_thread(start_server, self.config, port=number_of(self.place), log=self.log)
            await shop.get("/health/ready")

    def _note(self, victim: str) -> None:
        self.kills[victim] += 1
        self.last = victim

    def _training_child(self) -> psutil.Process | None:
        try:
            children = psutil.Process(self.server.process.pid).children(recursive=True)
            return next((child for child in children if "pairloop.learner" in child.cmdline()), None)
        except psutil.Error:
            return None


async def _live(executioner: Executioner, crowd: Crowd) -> tuple[Tally, list[dict[str, Any]]]:
    """Rounds of customers and cycles until all kills have happened, and one round more."""
    tally, ended = Tally(), []
    train_pool, gate_pool = crowd.members(Pool.TRAIN), crowd.members(Pool.GATE)
    # On a busy machine a customer may be unlucky in all of the server's short lives.
    async with open_shop("support-bot", lambda: executioner.server.url, away_s=PATIENCE_S) as shop:
        killing = asyncio.create_task(executioner.work(shop))
        is_last = False
        while not is_last:
            is_last = killing.done()
            await send(shop, crowd, [*islice(train_pool, CUSTOMERS), *islice(gate_pool, 12)], tally)
            ended.append(dict(await run_cycle(shop, crowd, gate_pool, tally, "crash", Silent(), {})))
        await killing
    return tally, ended


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = starter_recipe()
    settings["gate"] = {"max_picks": 120}
    settings["train"] |= {"checkpoint_every": 2, "epochs": 3}
    settings["schedule"] = {"min_pairs": 0, "lease": "5s"}
    config_path = write_config(tmp_path / "bot", settings)
    executioner = Executioner.start(config_path, tmp_path / "server.log", seed=1)
    crowd = Crowd(7, Behaviour(), load_config(config_path, env={}).serve.gate_share)
    try:
        tally, ended = asyncio.run(asyncio.wait_for(_live(executioner, crowd), PATIENCE_S))
    finally:
        executioner.server.stop()
        executioner.place.close()
    print(
        f"kills: {dict(executioner.kills)}; cycles: {[cycle['state'] for cycle in ended]}; "
        f"{tally.groups} groups answered, {len(tally.picks)} picks acknowledged"
    )
    assert executioner.kills.total() >= KILLS
    assert executioner.kills["child"] > 0
    assert {CycleState(cycle["state"]) for cycle in ended} <= ENDS
    _check_evidence(config_path, tally)


def _check_evidence(config_path: Path, tally: Tally) -> None:
    """Every acknowledged pick once, every group it names whole, every version whole, no invariant broken."""
    config = load_config(config_path, env={})
    store = Store.open(config)
    try:
        with store.reading() as c:
            stored = Counter(c.execute(sa.text("SELECT feedback_id FROM feedback")).scalars())
            assert {feedback_id: stored[feedback_id] for feedback_id in tally.picks} == dict.fromkeys(tally.picks, 1)
            for group_id in tally.picks.values():
                group = groups.get(c, group_id)
                assert group is not None
                assert len(group.completions) == 2
            for version in versions.list_(c, config.policy.name):
                if version.kind is not VersionKind.BASE:
                    store.artifacts.verify(version.artifact_hash)
            assert all(one.state in ENDS for one in cycles.list_(c, config.policy.name))
        assert doctor.check(store) == []
    finally:
        store.close()
