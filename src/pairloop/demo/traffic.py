"""The starter's customers over HTTP: each asks, reads two answers, picks one, and a fifth goes on with it.

A customer whose request meets a server that is away asks again when it is back, and repeats a pick under the same id, so
a pick counts once however often it was sent.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from pairloop.errors import SystemFailure
from pairloop.loop.serve import pool_of
from pairloop.starter import corpus, customers
from pairloop.types import Pool

CONCURRENCY = 32
RETRY_PAUSE_S = 0.1
AWAY_TIMEOUT_S = 60.0

_SIDES = {"left": (0, 1), "right": (1, 0)}


@dataclass(frozen=True)
class Crowd:
    """Where customers come from: one seed names them all, with their cases and tastes."""

    seed: int
    behaviour: customers.Behaviour
    gate_share: float
    picks: bool = True
    """Whether they pick at all; where a verifier labels, they only ask."""

    def members(self, pool: Pool) -> Iterator[int]:
        """The customers of one pool, by number."""
        number = 0
        while True:
            if pool_of(self.user(number), self.gate_share) is pool:
                yield number
            number += 1

    def user(self, number: int) -> str:
        return f"customer-{self.seed}-{number:06d}"


@dataclass
class Tally:
    """What the server acknowledged: groups answered, and picks by their ids."""

    groups: int = 0
    picks: dict[str, str] = field(default_factory=dict)
    """Acknowledged preference id → group id."""


@dataclass(frozen=True)
class Shop:
    """The server as customers see it. ``url`` is asked before each request, so that it may move when the server restarts."""

    client: httpx.AsyncClient
    policy: str
    url: Callable[[], str]
    away_s: float = AWAY_TIMEOUT_S

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply, asked for again while the server is away or busy; SystemFailure after ``away_s`` or on a refusal."""
        return await self._request("POST", path, body)

    async def get(self, path: str) -> dict[str, Any]:
        return await self._request("GET", path, None)

    async def _request(self, verb: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        clock = asyncio.get_running_loop()
        deadline = clock.time() + self.away_s
        while True:
            try:
                reply = await self.client.request(verb, self.url() + path, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if reply.is_success:
                    return dict(reply.json())
                problem = f"{reply.status_code}: {reply.text[:500]}"
                if reply.status_code < 500:
                    raise SystemFailure(f"{verb} {path} was refused: {problem}")
            if clock.time() > deadline:
                raise SystemFailure(f"{verb} {path}: the server stayed away for {self.away_s:.0f} s; last: {problem}")
            await asyncio.sleep(RETRY_PAUSE_S)


@asynccontextmanager
async def open_shop(policy: str, url: Callable[[], str], *, away_s: float = AWAY_TIMEOUT_S) -> AsyncIterator[Shop]:
    limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
    async with httpx.AsyncClient(timeout=60.0, limits=limits, trust_env=False) as client:
        yield Shop(client, policy, url, away_s)


async def send(
    shop: Shop, crowd: Crowd, numbers: Sequence[int], tally: Tally, *, on_done: Callable[[], None] = lambda: None
) -> None:
    """Sends these customers, at most CONCURRENCY at a time, until each has had their say."""
    waiting = iter(numbers)

    async def one_after_another() -> None:
        for number in waiting:
            await _visit(shop, crowd, number, tally)
            on_done()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(CONCURRENCY, len(numbers))):
            group.create_task(one_after_another())


async def _visit(shop: Shop, crowd: Crowd, number: int, tally: Tally) -> None:
    rng = random.Random(f"{crowd.seed}|{number}")
    customer = customers.Customer(crowd.user(number), crowd.behaviour)
    case = corpus.draw_training_case(rng)
    messages = case.messages()
    answer = await _ask_and_pick(shop, crowd, customer, case, messages, None, rng, tally)
    if answer is not None and customer.continues(rng):
        turn = customers.follow_up(case, rng)
        messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        await _ask_and_pick(shop, crowd, customer, case, messages, turn, rng, tally)


async def _ask_and_pick(
    shop: Shop,
    crowd: Crowd,
    customer: customers.Customer,
    case: corpus.Case,
    messages: list[dict[str, str]],
    turn: str | None,
    rng: random.Random,
    tally: Tally,
) -> str | None:
    """The text that was picked, or None where nothing was."""
    body = {"model": shop.policy, "messages": messages, "n": 2, "user": customer.user_id}
    reply = await shop.post("/v1/chat/completions", body)
    tally.groups += 1
    left, right = (str(choice["message"]["content"]) for choice in reply["choices"])
    if not crowd.picks:
        return None
    pick = customer.pick(case, left, right, rng, turn=turn)
    feedback_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    preference = {"id": feedback_id, "inference_id": reply["id"], "rater_id": customer.user_id, "latency_ms": pick.latency_ms}
    if pick.outcome in _SIDES:
        chosen, rejected = _SIDES[pick.outcome]
        preference |= {"outcome": "chosen", "chosen_index": chosen, "rejected_index": rejected}
    else:
        preference |= {"outcome": pick.outcome}
    await shop.post("/v1/preferences", preference)
    tally.picks[feedback_id] = str(reply["id"])
    return {"left": left, "right": right}.get(pick.outcome)
