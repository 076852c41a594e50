"""kill -9 of the server at random moments under clients that pick: is every acknowledged pick there, once? No torch.

A real ``pairloop serve`` with the fake policy and SQLite, each commit on the disk before its answer. The clients chat, pick,
and send again what was not acknowledged, under the same ids; after each restart they also send again a pick that was.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from pairloop.bench.trust import TrustSettings
from pairloop.config import Config, load_config
from pairloop.demo.server import ServerProcess, start_server
from pairloop.errors import SystemFailure
from pairloop.scaffold import write_config
from pairloop.store import Store, doctor
from pairloop.store.schema import feedback
from pairloop.types import PREFERENCE_METRIC

KILLS, QUICK_KILLS = 200, 5
CLIENTS = 8
LONGEST_LIFE_S = 1.0
"""A server is killed so long after it began to listen, or sooner."""
RETRY_S = 0.1
PATIENCE_S = 60.0
HEADERS = ("kills", "acknowledged picks", "lost", "doubled", "changed", "sent again", "broken invariants")


@dataclass
class Tally:
    """What the clients were told: of each acknowledged pick its group and the chosen index, by feedback id.

    ``sent_again``: requests that a killed server had taken, and that a later one answered. ``not_known``: acknowledged picks
    that came again, and were not known as duplicates.
    """

    acknowledged: dict[str, tuple[str, int]] = field(default_factory=dict)
    sent_again: int = 0
    not_known: list[str] = field(default_factory=list)


def measure(settings: TrustSettings, *, kills: int | None = None) -> dict[str, Any]:
    """Kills, acknowledged picks, and how many of those are lost, doubled or changed in the store at the end.

    SystemFailure where a server does not come up again, or gives an answer that no client could expect.
    """
    kills = kills or (QUICK_KILLS if settings.quick else KILLS)
    folder = settings.folder / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    config = write_config(folder, {"policy": {"model": "fake"}, "schedule": {"min_pairs": 0}})
    tally, begun_s = Tally(), time.monotonic()
    asyncio.run(_run(config, kills, random.Random(settings.seed), tally, settings))
    return {
        "kills": kills,
        **count(load_config(config, env={}), tally),
        "sent_again": tally.sent_again,
        "clients": CLIENTS,
        "seed": settings.seed,
        "wall_s": time.monotonic() - begun_s,
    }


def rows(found: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """The table of ``measure``, below `HEADERS`."""
    names = ("kills", "acknowledged", "lost", "doubled", "changed", "sent_again", "problems")
    return [[f"{found[name]:,}" for name in names]]


async def _run(config: Path, kills: int, rng: random.Random, tally: Tally, settings: TrustSettings) -> None:
    done = asyncio.Event()
    with socket.socket() as place:  # never listened on: it holds the port, which nobody else gets while the server is away
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(_client(url, number, random.Random(rng.random()), tally, done))
            try:
                await _kill(config, port, kills, rng, settings)
            finally:
                done.set()


async def _kill(config: Path, port: int, kills: int, rng: random.Random, settings: TrustSettings) -> None:
    """Start a server, let it answer for a random while, kill it: ``kills`` times. The last one ends the same way."""
    for number in range(kills):
        server: ServerProcess = await asyncio.to_thread(start_server, config, port=port, log=config.with_name("server.log"))
        try:
            await asyncio.sleep(rng.uniform(0.0, LONGEST_LIFE_S))
            if server.process.poll() is not None:
                raise SystemFailure(f"the server ended by itself: see {server.log}")
        finally:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        settings.on_step("kills", number + 1, kills)


async def _client(url: str, number: int, rng: random.Random, tally: Tally, done: asyncio.Event) -> None:
    """A closed loop of chats and picks, each sent until it is acknowledged, under one id."""
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:
        while not done.is_set():
            chat = {
                "model": "support-bot",
                "n": 2,
                "user": f"user-{rng.randrange(10**9)}",
                "messages": [{"role": "user", "content": f"question {rng.randrange(10**9)} of client {number}"}],
            }
            key = {"Idempotency-Key": str(uuid.uuid4())}
            answer = await _until_acknowledged(http, "/v1/chat/completions", chat, done, tally, key)
            if answer is None:
                return
            chosen, pick_id = rng.randrange(2), f"pick-{uuid.uuid4()}"
            pick = {"id": pick_id, "inference_id": answer["id"], "chosen_index": chosen, "rejected_index": 1 - chosen}
            before = tally.sent_again
            if await _until_acknowledged(http, "/v1/preferences", pick, done, tally) is None:
                return
            tally.acknowledged[pick_id] = (answer["id"], chosen)
            if tally.sent_again > before:  # a server was killed meanwhile: is the pick known when it comes once more?
                replay = await _until_acknowledged(http, "/v1/preferences", pick, done, tally)
                if replay is not None and not replay.get("duplicate"):
                    tally.not_known.append(pick_id)


async def _until_acknowledged(
    http: httpx.AsyncClient,
    path: str,
    body: Mapping[str, Any],
    done: asyncio.Event,
    tally: Tally,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """The first answer of a server that lived long enough to give one; None where no server will come again."""
    is_first = True
    while not done.is_set():
        try:
            reply = await http.post(path, json=body, headers=headers)
        except httpx.ConnectError:  # there is no server now
            pass
        except httpx.TransportError:
            is_first = False
        else:
            tally.sent_again += not is_first
            if reply.status_code < 300:
                found: dict[str, Any] = reply.json()
                return found
            if reply.status_code not in (409, 503):  # the same key is still being answered; the store is away
                raise SystemFailure(f"POST {path} was answered {reply.status_code}: {reply.text[:500]}")
            is_first = False
        await asyncio.sleep(RETRY_S)
    return None


def count(config: Config, tally: Tally) -> dict[str, int]:
    """What the store says about the picks that were acknowledged."""
    with Store.open(config) as store:
        with store.reading() as c:
            columns = (feedback.c.feedback_id, feedback.c.group_id, feedback.c.label)
            stored = c.execute(sa.select(*columns).where(feedback.c.metric == PREFERENCE_METRIC)).all()
        problems = doctor.check(store)
    by_id = {row.feedback_id: row for row in stored}
    per_group = Counter(row.group_id for row in stored)
    lost = [one for one in tally.acknowledged if one not in by_id]
    changed = [
        one
        for one, (group_id, chosen) in tally.acknowledged.items()
        if one in by_id and (by_id[one].group_id, by_id[one].label) != (group_id, "AB"[chosen])
    ]
    return {
        "acknowledged": len(tally.acknowledged),
        "lost": len(lost),
        "doubled": sum(picks > 1 for picks in per_group.values()),
        "changed": len(changed),
        "not_known": len(tally.not_known),
        "stored": len(stored),
        "problems": len(problems),
    }
