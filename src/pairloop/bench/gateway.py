"""What the server adds to a request: CPU time and latency, with each group stored durably, beside a bare server. No torch.

Both servers are processes of their own and take turns; the bare one answers the same bytes and does nothing else. The fake
policy samples, so that what is measured is the server: its web side, the loop's decisions and the store.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from pairloop.bench import load
from pairloop.bench.servers import Server, pairloop_server, process
from pairloop.bench.settings import Settings
from pairloop.config import parse_config
from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import SampleRequest
from pairloop.store import Store, groups, new_group_id
from pairloop.types import BASE_VERSION, Group, GroupKind, Message, Pool, SamplingParams

POLICY = "bench"
CLIENTS = (1, 16)
KINDS = ("whole", "stream")
REQUESTS = {1: 300, 16: 1_600}
QUICK_SHARE = 0.25
COMMITS = 100
SOAK_STEPS = 10


def bench(settings: Settings, *, soak: int = 0) -> dict[str, Any]:
    """Both servers' CPU and latency by kind and number of clients; one commit's cost; memory over ``soak`` requests."""
    folder = settings.folder / "gateway"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    load_average = os.getloadavg()[0]
    with ExitStack() as running:
        ours = running.enter_context(pairloop_server(folder, POLICY))
        bare = running.enter_context(_bare(folder, ours))
        found = _turns(settings, ours, bare, _Commits(folder))
        if soak:
            found["memory"] = _soak(settings, ours, soak)
    return {"load_average": round(load_average, 1), "processors": os.cpu_count(), **found}


def _turns(settings: Settings, ours: Server, bare: Server, commits: _Commits) -> dict[str, Any]:
    """The two take turns, round after round; the first round warms up and does not count."""
    cells = [(kind, clients) for kind in KINDS for clients in CLIENTS]
    turns: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    commit_ms: list[float] = []
    for number in range(settings.rounds + 1):
        settings.on_step("gateway", number, settings.rounds + 1)
        commit_ms += commits.measure() if number else []
        for kind, clients in cells:
            for name, server in (("pairloop", ours), ("bare", bare)):
                count = round(REQUESTS[clients] * (QUICK_SHARE if settings.quick else 1))
                figures = _turn(server, kind, clients, count, first=number * count)
                if number:
                    turns.setdefault((kind, clients, name), []).append(figures)
    found = [_cell(kind, clients, turns[kind, clients, "pairloop"], turns[kind, clients, "bare"]) for kind, clients in cells]
    return {"commit_ms": _spread([*map(median, _batches(commit_ms))]), "cells": found}


def _turn(server: Server, kind: str, clients: int, count: int, *, first: int) -> dict[str, float]:
    requests = [load.request_bytes(server.url, _body(kind, first + number)) for number in range(count)]
    before = server.cpu_s
    done = load.run(server.url, requests, clients)
    cpu_ms = 1000 * (server.cpu_s - before) / count
    percentiles = quantiles(done.first_s if kind == "stream" else done.whole_s, n=100)
    return {
        "cpu_ms": cpu_ms,
        "p50_ms": 1000 * percentiles[49],
        "p99_ms": 1000 * percentiles[98],
        "requests_per_s": count / done.wall_s,
    }


def _cell(kind: str, clients: int, ours: Sequence[Mapping[str, float]], bare: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """A server's figures, and what ours adds, turn by turn: median, smallest, largest."""
    added = [{key: one[key] - other[key] for key in ("cpu_ms", "p50_ms")} for one, other in zip(ours, bare, strict=True)]
    tails = [turn["p99_ms"] / turn["p50_ms"] for turn in ours]
    return {
        "kind": kind,
        "clients": clients,
        "pairloop": {key: _spread([turn[key] for turn in ours]) for key in ours[0]},
        "bare": {key: _spread([turn[key] for turn in bare]) for key in bare[0]},
        "added": {key: _spread([turn[key] for turn in added]) for key in added[0]},
        "p99_over_p50": _spread(tails),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def _batches(values: Sequence[float]) -> list[Sequence[float]]:
    return [values[start : start + COMMITS] for start in range(0, len(values), COMMITS)]


def _body(kind: str, number: int) -> dict[str, Any]:
    """Two answers to a question, by one of a thousand users."""
    body: dict[str, Any] = {
        "model": POLICY,
        "messages": [{"role": "user", "content": f"Where is my order {number}? I have been waiting for it since Monday."}],
        "n": 2,
        "user": f"customer-{number % 1_000}",
    }
    return body | ({"stream": True} if kind == "stream" else {})


def _soak(settings: Settings, server: Server, count: int) -> list[dict[str, float]]:
    """The server's memory after each tenth of ``count`` requests of 16 clients, half of them streams."""
    rows = [{"requests": 0, "rss_mb": round(server.rss_mb, 1)}]
    share = max(1, count // SOAK_STEPS)
    for done in range(0, count, share):
        settings.on_step("memory", done, count)
        kinds = (KINDS[number % 2] for number in range(share))
        requests = [load.request_bytes(server.url, _body(kind, done + number)) for number, kind in enumerate(kinds)]
        load.run(server.url, requests, 16)
        rows.append({"requests": done + share, "rss_mb": round(server.rss_mb, 1)})
    return rows


class _Commits:
    """What one durable commit of such a group costs on this disk, with nobody else about."""

    def __init__(self, folder: Path) -> None:
        self._config = parse_config({"state_dir": folder / "commits", "policy": {"name": POLICY, "model": "fake"}})
        asked = _body("whole", 0)
        prompt = tuple(Message(**message) for message in asked["messages"])
        with closing(FakePolicy()) as policy:
            ids = policy.tokens.encode_prompt(prompt)
            answers = policy.sample(SampleRequest(ids, BASE_VERSION, asked["n"], SamplingParams())).result()
        self._group = Group(
            "", POLICY, GroupKind.TRAIN, Pool.TRAIN, prompt, answers, datetime.now(UTC), ids, user=asked["user"]
        )

    def measure(self) -> list[float]:
        """Milliseconds of each of ``COMMITS`` writes, one after the other."""
        taken = []
        with Store.open(self._config) as store:
            for _ in range(COMMITS):
                insert = partial(groups.insert, group=replace(self._group, group_id=new_group_id()))
                begun = perf_counter()
                store.write(insert)
                taken.append(1000 * (perf_counter() - begun))
        return taken


@contextmanager
def _bare(folder: Path, ours: Server) -> Iterator[Server]:
    """The bare server, with what ours answers."""
    pieces = {kind: asyncio.run(load.one_reply(ours.url, load.request_bytes(ours.url, _body(kind, 0))))[1] for kind in KINDS}
    replies = {"whole": pieces["whole"][0].decode(), "events": [piece.decode() for piece in pieces["stream"]]}
    (folder / "replies.json").write_text(json.dumps(replies), encoding="utf-8")
    with process(["-m", "pairloop.bench.bare", str(folder / "replies.json")], folder / "bare.log") as server:
        yield server
