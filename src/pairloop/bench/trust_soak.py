"""Half an hour of everything at once: chats whole and streamed, picks, values, reads, and cycles that train, duel and promote.

What must hold: no request fails, and the server's memory does not grow.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from time import monotonic, perf_counter
from typing import Any

import httpx

from pairloop.bench import trust_memory
from pairloop.bench.servers import Server
from pairloop.bench.trust import TrustSettings
from pairloop.bench.trust_memory import TENTHS, Memory
from pairloop.config import load_config
from pairloop.demo.server import start_server
from pairloop.policy.fake import quality
from pairloop.scaffold import write_config
from pairloop.store import Store, cycles, doctor

HEADERS = (
    "minutes",
    "requests",
    "failed",
    "told to come again",
    "cycles",
    "promoted",
    "MB of memory",
    "its growth after the warm-up, by a line through the tenths, with its 95 % interval",
    "p99 of a chat, ms",
    "doctor",
)
CLIENTS = 8
PAUSE_S = 0.02
"""Between two requests of a client: a mixed load, not the highest one."""
READINGS = 100
"""Of the memory, evenly through the time; with each the load also scrapes ``/metrics``."""
PATIENCE_S = 60.0
TRIES = 3
"""Of a request that is refused with 503 and `retry-after`, after each such wait: what OpenAI's client does."""
QUICK_MINUTES = 0.5
READS = ("/v1/status", "/metrics", "/v1/versions", "/v1/cycles", "/v1/gates", "/v1/raters?limit=5", "/health/ready")
CONFIG: dict[str, dict[str, Any]] = {
    "policy": {"model": "fake", "method": "full"},
    "schedule": {"min_pairs": 300, "poll": "1s"},
    "gate": {"max_picks": 200, "max_hours": 0.05},
    "serve": {"gate_share": 0.4},
}


@dataclass
class _Seen:
    """What the clients saw, latencies tenth by tenth, and the server's memory."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """Back-pressure: how often a request was told to come again, by the error's code; it failed only if it was at last, too."""
    chat_s: list[list[float]] = field(default_factory=lambda: [[]])
    memory: Memory = field(default_factory=Memory)


def measure(settings: TrustSettings) -> dict[str, Any]:
    """The load for so many minutes on a server of its own; then the doctor looks at what is left."""
    minutes = QUICK_MINUTES if settings.quick else settings.minutes
    folder = settings.folder / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    path = write_config(folder, CONFIG)
    config = load_config(path, env={})
    server = start_server(path, log=folder / "server.log")
    try:
        seen = asyncio.run(_run(Server(server.process.pid, server.url), 60 * minutes, settings))
    finally:
        server.stop()
    with Store.open(config) as store:
        ends = ends_of_cycles(store, config.policy.name)
        problems = [f"{one.code}: {one.text}" for one in doctor.check(store)]
    return {
        "minutes": minutes,
        "requests": seen.requests,
        "failed": len(seen.failures),
        "failures": seen.failures[:10],
        "refused": dict(seen.refused),
        "cycles": sum(ends.values()),
        "ends": ends,
        "memory": trust_memory.figures(seen.memory, minutes),
        "p99_ms": [round(1000 * quantiles(one, n=100)[98], 1) for one in seen.chat_s if len(one) > 1],
        "problems": problems,
    }


def ends_of_cycles(store: Store, policy: str) -> dict[str, int]:
    """How many cycles are in each state."""
    with store.reading() as c:
        return dict(Counter(str(one.state) for one in cycles.list_(c, policy, cycles.next_number(c, policy))))


def rows(found: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """The table of ``measure``, below `HEADERS`."""
    return [
        (
            f"{found['minutes']:g}",
            f"{found['requests']:,}",
            f"{found['failed']:,}",
            f"{sum(found['refused'].values()):,}",
            f"{found['cycles']:,}",
            f"{found['ends'].get('promoted', 0):,}",
            *trust_memory.told(found["memory"]),
            f"{found['p99_ms'][0]:.0f} → {found['p99_ms'][-1]:.0f}" if found["p99_ms"] else "",
            f"{len(found['problems'])} problems",
        )
    ]


async def _run(server: Server, seconds: float, settings: TrustSettings) -> _Seen:
    seen, stop = _Seen(), asyncio.Event()
    patient = Patient(seen.refused)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, trust_env=False, transport=patient) as http:
        await seen.memory.read(server, http)
        clients = [asyncio.create_task(_client(http, number, seen, stop)) for number in range(CLIENTS)]
        begun = monotonic()
        for reading in range(1, READINGS + 1):
            await asyncio.sleep(max(0.0, begun + reading * seconds / READINGS - monotonic()))
            await seen.memory.read(server, http)
            if reading % (READINGS // TENTHS) == 0:
                if reading < READINGS:  # those under way at the end belong to the last tenth
                    seen.chat_s.append([])
                settings.on_step("soak", reading * TENTHS // READINGS, TENTHS)
        stop.set()
        await asyncio.gather(*clients)
    return seen


class Patient(httpx.AsyncHTTPTransport):
    """Asks again what is refused for now, as clients do, and counts in ``refused`` how often."""

    def __init__(self, refused: Counter[str]) -> None:
        super().__init__()
        self._refused = refused

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        for _ in range(TRIES - 1):
            response = await super().handle_async_request(request)
            if response.status_code != 503 or "retry-after" not in response.headers:
                return response
            error = json.loads(await response.aread())["error"]
            self._refused[error["code"]] += 1
            await asyncio.sleep(float(response.headers["retry-after"]))
        return await super().handle_async_request(request)


async def _client(http: httpx.AsyncClient, number: int, seen: _Seen, stop: asyncio.Event) -> None:
    rng, turn = random.Random(number), 0
    while not stop.is_set():
        turn += 1
        seen.requests += 1
        try:
            await _turn(http, f"user-{number}-{turn}", rng, seen)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            seen.failures.append(f"{type(error).__name__}: {error}")
        await asyncio.sleep(PAUSE_S)


async def _turn(http: httpx.AsyncClient, user: str, rng: random.Random, seen: _Seen) -> None:
    """One customer: two answers, a pick, now and then a single answer with a thumb, and somebody who looks at the loop."""
    kind = rng.random()
    if kind < 0.1:
        (await http.get(rng.choice(READS))).raise_for_status()
        return
    body = {"model": "support-bot", "user": user, "messages": [{"role": "user", "content": f"I am {user}, and you?"}]}
    if kind < 0.2:
        reply = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
        value = {"inference_id": reply["id"], "choice_index": 0, "metric_name": "thumbs", "value": rng.random() < 0.5}
        (await http.post("/v1/feedback", json=value)).raise_for_status()
        return
    begun = perf_counter()
    inference_id, texts = await (_streamed if kind < 0.6 else _whole)(http, {**body, "n": 2})
    seen.chat_s[-1].append(perf_counter() - begun)
    better = max((0, 1), key=lambda index: quality(texts[index]))
    pick = {"inference_id": inference_id, "chosen_index": better, "shown_order": [0, 1], "latency_ms": 4_000}
    (await http.post("/v1/preferences", json=pick)).raise_for_status()


async def _whole(http: httpx.AsyncClient, body: Mapping[str, Any]) -> tuple[str, list[str]]:
    reply = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
    return reply["id"], [choice["message"]["content"] for choice in reply["choices"]]


async def _streamed(http: httpx.AsyncClient, body: Mapping[str, Any]) -> tuple[str, list[str]]:
    """ValueError where the stream ends with anything but [DONE]."""
    texts, inference_id, last = ["", ""], "", ""
    async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line:
                continue
            last = line.removeprefix("data: ")
            if last == "[DONE]":
                continue
            chunk = json.loads(last)
            inference_id = chunk["id"]
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    if last != "[DONE]":
        raise ValueError(f"the stream ended with {last[:200]}")
    return inference_id, texts
