"""Versions that change under load: no request fails, and no group mixes versions that it should not.

A real server with the fake policy; clients stream pairs all the while. Each swap makes a version, opens its duel, waits until
some of its groups were answered, and promotes it by hand over the API; now and then a rollback follows.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.bench.trust import TrustSettings
from pairloop.config import Config, load_config
from pairloop.demo.server import start_server
from pairloop.errors import SystemFailure
from pairloop.policy.fake import write_skill
from pairloop.scaffold import write_config
from pairloop.store import Store, cycles, duels, groups, new_id, versions
from pairloop.store.schema import groups as group_table
from pairloop.types import Alias, Cycle, CycleState, CycleStep, Duel, GroupKind, Version, VersionKind

HEADERS = ("swaps", "rollbacks", "requests", "failed", "train groups of several versions", "duel groups of one version")
CLIENTS = 32
SWAPS, ROLLBACKS = 50, 10
QUICK_SWAPS, QUICK_ROLLBACKS = 5, 1
REQUESTS_BETWEEN = 64
"""Answers between two moves of an alias: each version serves, and each duel is served."""
PATIENCE_S = 60.0


@dataclass
class _Crowd:
    """What the clients have seen so far."""

    answered: int = 0
    failures: list[str] | None = None

    def failed(self, why: str) -> None:
        self.failures = [*(self.failures or []), why]


def measure(settings: TrustSettings) -> dict[str, Any]:
    """Swaps and rollbacks under the load of 32 streaming clients; then every stored group is looked at."""
    swaps, rollbacks = (QUICK_SWAPS, QUICK_ROLLBACKS) if settings.quick else (SWAPS, ROLLBACKS)
    folder = settings.folder / "swap"
    shutil.rmtree(folder, ignore_errors=True)
    path = write_config(folder, {"policy": {"model": "fake", "method": "full"}, "schedule": {"enabled": False, "jobs": False}})
    server = start_server(path, log=folder / "server.log")
    config = load_config(path, env={})
    try:
        with Store.open(config) as store:
            crowd = asyncio.run(_run(server.url, store, config, swaps, rollbacks, settings))
            mixed, one_sided, duelled = count_mixed(store, config)
    finally:
        server.stop()
    failures = crowd.failures or []
    return {
        "swaps": swaps,
        "rollbacks": rollbacks,
        "clients": CLIENTS,
        "requests": crowd.answered + len(failures),
        "failed": len(failures),
        "failures": failures[:10],
        "mixed": mixed,
        "one_sided_duels": one_sided,
        "duel_groups": duelled,
    }


def rows(found: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """The table of ``measure``, below `HEADERS`."""
    names = ("swaps", "rollbacks", "requests", "failed", "mixed")
    return [[*(f"{found[name]:,}" for name in names), f"{found['one_sided_duels']:,} of {found['duel_groups']:,}"]]


async def _run(url: str, store: Store, config: Config, swaps: int, rollbacks: int, settings: TrustSettings) -> _Crowd:
    crowd, stop = _Crowd(), asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits, trust_env=False) as http:
        clients = [asyncio.create_task(_client(http, config.policy.name, number, crowd, stop)) for number in range(CLIENTS)]
        try:
            every = swaps // rollbacks
            for number in range(1, swaps + 1):
                settings.on_step("swap", number, swaps)
                await _swap(http, store, config, number, crowd)
                if number % every == 0:
                    await _answers(crowd, REQUESTS_BETWEEN)
                    await _post(http, f"/v1/policies/{config.policy.name}/rollback")
            await _answers(crowd, REQUESTS_BETWEEN)
        finally:
            stop.set()
            await asyncio.gather(*clients)
    return crowd


async def _swap(http: httpx.AsyncClient, store: Store, config: Config, number: int, crowd: _Crowd) -> None:
    """A new version duels for a while and is promoted by hand, which ends its duel."""
    version = await asyncio.to_thread(_make, store, config, number)
    cycle_id = await asyncio.to_thread(_open_duel, store, version)
    await _answers(crowd, REQUESTS_BETWEEN)
    await _post(http, f"/v1/versions/{version.name}/promote")
    ended = CycleStep(CycleState.PROMOTED, {"version": version.number, "reason": "by hand"}, datetime.now(UTC))
    await asyncio.to_thread(store.write, lambda c: cycles.step(c, cycle_id, ended))
    await _answers(crowd, REQUESTS_BETWEEN)


async def _answers(crowd: _Crowd, more: int) -> None:
    """Until so many more requests were answered; SystemFailure where none come."""
    goal = crowd.answered + more
    async with asyncio.timeout(PATIENCE_S):
        while crowd.answered < goal:
            await asyncio.sleep(0.005)


async def _post(http: httpx.AsyncClient, path: str) -> None:
    reply = await http.post(path, json={"reason": "measured under load"})
    if reply.status_code != 200:
        raise SystemFailure(f"POST {path} was answered {reply.status_code}: {reply.text[:500]}")


async def _client(http: httpx.AsyncClient, model: str, number: int, crowd: _Crowd, stop: asyncio.Event) -> None:
    """Streams pairs for one user after another, so that both pools are served."""
    asked = 0
    while not stop.is_set():
        asked += 1
        message = {"role": "user", "content": f"Where is my order {number}-{asked}?"}
        body = {"model": model, "n": 2, "stream": True, "user": f"user-{number}-{asked}", "messages": [message]}
        try:
            await _stream(http, body)
            crowd.answered += 1
        except (httpx.HTTPError, SystemFailure) as error:
            crowd.failed(f"{type(error).__name__}: {error}")


async def _stream(http: httpx.AsyncClient, body: Mapping[str, Any]) -> None:
    """SystemFailure for anything but a stream that ends as it should, with both answers finished."""
    finished: set[int] = set()
    last = ""
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise SystemFailure(f"{reply.status_code}: {(await reply.aread()).decode(errors='replace')[:300]}")
        async for line in reply.aiter_lines():
            if not line:
                continue
            last = line.removeprefix("data: ")
            if last == "[DONE]":
                continue
            chunk = json.loads(last)
            if "error" in chunk:
                raise SystemFailure(f"the stream broke: {chunk['error']}")
            finished |= {choice["index"] for choice in chunk["choices"] if choice["finish_reason"]}
    if last != "[DONE]" or finished != {0, 1}:
        raise SystemFailure(f"a stream ended early: {last[:200]}")


def _make(store: Store, config: Config, number: int) -> Version:
    """A version that training could have made, a child of the base."""
    with store.artifacts.stage() as folder:
        write_skill(folder, number)
        artifact = store.artifacts.publish(folder, {"noun": "version"})
    version = Version(
        config.policy.name, number, VersionKind.FULL, str(artifact.path), artifact.hash, 0, None, None, datetime.now(UTC)
    )
    store.write(lambda c: versions.insert(c, version))
    return version


def _open_duel(store: Store, version: Version) -> str:
    """The duel of a cycle that is past its check."""
    now = datetime.now(UTC)

    def write(c: Connection) -> str:
        champion = versions.alias(c, version.policy, Alias.CHAMPION) or 0
        states = (CycleState.BUILDING, CycleState.TRAINING, CycleState.CHECKING, CycleState.DUELLING)
        steps = tuple(CycleStep(state, {}, now) for state in states)
        cycle = Cycle(new_id("cycle"), version.policy, version.number, champion, "measured", now, steps)
        cycles.insert(c, cycle)
        duels.open(c, Duel(new_id("duel"), cycle.cycle_id, version.policy, champion, version.number, now))
        versions.set_alias(c, version.policy, Alias.CHALLENGER, version.number)
        return cycle.cycle_id

    return store.write(write)


def count_mixed(store: Store, config: Config) -> tuple[int, int, int]:
    """Groups of the champion that hold two versions, duel groups that do not hold both of theirs, and all duel groups."""
    mixed = one_sided = duelled = 0
    with store.reading() as c:
        sides = {duel.duel_id: {duel.champion, duel.challenger} for duel in duels.list_(c, config.policy.name, 1_000)}
        for group in groups.load(c, sa.select(group_table).where(group_table.c.policy == config.policy.name)):
            answered_by = {completion.version for completion in group.completions}
            if group.kind is GroupKind.DUEL:
                duelled += 1
                one_sided += answered_by != sides[group.duel_id or ""]
            else:
                mixed += len(answered_by) > 1
    return mixed, one_sided, duelled
