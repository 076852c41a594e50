"""Whole loops whose picks are coin tosses: how many versions are promoted that nobody prefers.

Each loop is a server of its own with the fake policy, its schedule and its training child, driven over HTTP: four cycles, each
with its pairs and its duel. Coins and customers are drawn anew each time: no seed is chosen.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from time import monotonic
from typing import Any

import httpx

from pairloop.bench.trust import TrustSettings
from pairloop.config import GateSection
from pairloop.demo.server import start_server
from pairloop.errors import SystemFailure
from pairloop.loop.serve import pool_of
from pairloop.scaffold import write_config
from pairloop.statistics import binomial_tail
from pairloop.types import Pool

HEADERS = ("loops", "cycles", "duels", "promoted", "at most", "chance of so many or more at alpha")
LOOPS, QUICK_LOOPS = 20, 1
CYCLES = 4
TRAINING, GATE_POOL, WAVE = 64, 16, 50
"""Customers per cycle who train, and who are held out; and of the duel between two looks at whether it is over."""
MAX_PICKS = 600
CLIENTS = 8
PATIENCE_S = 120.0
SURE = 0.025
"""The bound is the largest number of promotions that is not rarer than this where every duel errs with chance alpha."""
CONFIG: dict[str, dict[str, Any]] = {
    "policy": {"model": "fake", "method": "full"},
    "schedule": {"min_pairs": 0, "poll": "1s"},
    "gate": {"max_picks": MAX_PICKS},
}
_TOSS = random.SystemRandom()


def measure(settings: TrustSettings) -> dict[str, Any]:
    """So many loops, one after the other; promotions are counted over all their duels."""
    loops = QUICK_LOOPS if settings.quick else LOOPS
    ends: list[list[dict[str, Any]]] = []
    for number in range(loops):
        settings.on_step("loops", number, loops)
        folder = settings.folder / "loops"
        shutil.rmtree(folder, ignore_errors=True)
        ends.append(_loop(folder))
    cycles = [one for of_loop in ends for one in of_loop]
    duels = sum(one["picks"] > 0 for one in cycles)
    promoted = sum(one["state"] == "promoted" for one in cycles)
    alpha = GateSection().alpha
    return {
        "loops": loops,
        "cycles": len(cycles),
        "duels": duels,
        "promoted": promoted,
        "bound": bound(duels, alpha),
        "p_so_many": binomial_tail(promoted, duels, alpha),
        "ends": ends,
    }


def rows(found: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """The table of ``measure``, below `HEADERS`."""
    counts = [f"{found[name]:,}" for name in ("loops", "cycles", "duels", "promoted", "bound")]
    return [[*counts, f"{found['p_so_many']:.2f}"]]


def bound(duels: int, alpha: float) -> int:
    """The most promotions that chance explains, of so many duels that each err with chance ``alpha``."""
    return max(k for k in range(duels + 1) if binomial_tail(k, duels, alpha) >= SURE)


def _loop(folder: Path) -> list[dict[str, Any]]:
    server = start_server(write_config(folder, CONFIG), log=folder / "server.log")
    try:
        return asyncio.run(_cycles(server.url))
    finally:
        server.stop()


async def _cycles(url: str) -> list[dict[str, Any]]:
    """How each cycle ended, and the picks of its duel."""
    ends: list[dict[str, Any]] = []
    trainers, judges = _users(Pool.TRAIN), _users(Pool.GATE)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:
        for _ in range(CYCLES):
            await _toss(http, [*islice(trainers, TRAINING), *islice(judges, GATE_POOL)])
            (await http.post("/v1/cycles", json={"reason": "coin tosses"})).raise_for_status()
            cycle = await _when(http, after=len(ends))
            picks = 0
            while cycle["state"] == "duelling":
                await _toss(http, islice(judges, WAVE))
                picks += WAVE
                cycle = await _when(http, after=len(ends), seen=picks)
            ends.append({"state": cycle["state"], "picks": picks})
    return ends


async def _when(http: httpx.AsyncClient, *, after: int, seen: int = 0) -> dict[str, Any]:
    """The newest cycle once it waits for picks or has ended; once its duel has had all its picks, only when that has ended.

    ``seen``: picks that its duel was given; the gate may not have looked at the last of them yet.
    """
    until = monotonic() + PATIENCE_S
    while monotonic() < until:
        found = (await http.get("/v1/cycles", params={"limit": 1})).raise_for_status().json()["data"]
        if found and found[0]["number"] > after:
            cycle: dict[str, Any] = found[0]
            if cycle["state"] == "duelling" and seen < MAX_PICKS:
                return cycle
            if cycle["state"] not in ("building", "training", "checking", "duelling"):
                return cycle
        await asyncio.sleep(0.1)
    raise SystemFailure(f"cycle {after + 1} did not move within {PATIENCE_S:.0f} s")


async def _toss(http: httpx.AsyncClient, users: Iterable[str]) -> None:
    """Each user is shown two answers, and tosses a coin."""
    waiting = iter(users)

    async def client() -> None:
        for user in waiting:
            body = {"model": "support-bot", "n": 2, "user": user, "messages": [{"role": "user", "content": f"I am {user}"}]}
            reply = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
            pick = {"inference_id": reply["id"], "chosen_index": _TOSS.randrange(2), "shown_order": [0, 1], "latency_ms": 4_000}
            (await http.post("/v1/preferences", json=pick)).raise_for_status()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def _users(pool: Pool) -> Iterator[str]:
    """Names without end that fall into the pool. Their digits are few: what looks like a phone number becomes a pseudonym."""
    return (user for user in (f"user-{number}" for number in count()) if pool_of(user, 0.2) is pool)
