"""How many picks a second are acknowledged, each on the disk before its 201, and whether every one of them is there. No torch.

A real server with the fake policy and SQLite (synchronous=FULL); the load comes from a small C program, so that what is
measured is the server. A second server, whose database has ten times the rows, takes turns with it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, text

from pairloop.bench.servers import Server, pairloop_server
from pairloop.bench.trust import TrustSettings
from pairloop.bench.trust_rows import add_groups, group_id
from pairloop.config import load_config
from pairloop.errors import SystemFailure
from pairloop.scaffold import write_config
from pairloop.statistics import percent
from pairloop.store import Store

HEADERS = ("clients", "acknowledged a second", "p50 ms", "p99 ms", "server CPU ms a pick", "promised", "kept")
POLICY = "bench"
PATH = "/v1/preferences"
SOURCE = Path(__file__).with_name("load.c")
GROWTH = 10
PATIENCE_S = 300.0
RATER = "rater-of-the-load"


@dataclass(frozen=True, slots=True)
class Promise:
    """At least so many acknowledged a second, 99 % of them within ``p99_ms``."""

    per_s: float
    p99_ms: float


PROMISES = {32: Promise(1_000, 50), 128: Promise(2_000, 120)}
MOST_GROWTH = 0.2


class Load:
    """The load program, compiled; each pick of its runs names another group and another rater. Remembers what was answered."""

    def __init__(self, folder: Path, *, seed: int = 0) -> None:
        self._folder = folder
        self._program = compiled(folder)
        self._random = random.Random(seed)
        self._numbers = count()
        self.acknowledged: dict[str, list[str]] = {}
        """By the server's name, the raters whose picks were answered 201."""

    def run(self, name: str, server: Server, clients: int, picks: int, *, groups: int) -> dict[str, float]:
        """Figures of ``picks`` picks about some of the server's ``groups``; SystemFailure where one was refused."""
        raters = [f"{RATER}-{next(self._numbers)}" for _ in range(picks)]
        chosen = self._random.sample(range(groups), picks)
        bodies, told = self._folder / "bodies.jsonl", self._folder / "acknowledged.txt"
        lines = (_body(rater, number) for rater, number in zip(raters, chosen, strict=True))
        bodies.write_text("".join(f"{json.dumps(body)}\n" for body in lines), encoding="utf-8")
        where, before = urlsplit(server.url), server.cpu_s
        command = [str(self._program), where.hostname, str(where.port), str(clients), PATH, str(bodies), str(told)]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        if done.returncode:
            raise SystemFailure(f"the load could not be run: {done.stderr.strip()}")
        found: dict[str, float] = json.loads(done.stdout)
        self.acknowledged.setdefault(name, []).extend(raters[int(line)] for line in told.read_text().split())
        if found["errors"]:
            status = f", the first with status {found['first_bad_status']:g}" if found["first_bad_status"] else ""
            raise SystemFailure(f"{found['errors']:g} of {picks} picks were not acknowledged{status}")
        per_s = found["acknowledged"] / found["seconds"]
        return {**found, "per_s": per_s, "cpu_ms": 1000 * (server.cpu_s - before) / picks}


def compiled(folder: Path) -> Path:
    """The load program, compiled into ``folder``; SystemFailure where there is no C compiler, or it fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemFailure("the load of picks is a C program, and there is no compiler (cc, gcc or clang): install one")
    program = folder / "load"
    done = subprocess.run([compiler, "-O2", "-o", str(program), str(SOURCE)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemFailure(f"{compiler} could not compile {SOURCE}: {done.stderr.strip()[:500]}")
    return program


def _body(rater: str, number: int) -> dict[str, Any]:
    return {
        "inference_id": group_id(number),
        "chosen_index": number % 2,
        "shown_order": [0, 1],
        "rater_id": rater,
        "latency_ms": 4_200,
    }


@dataclass(frozen=True, slots=True)
class Size:
    """Picks of one turn by number of clients, and groups in the smaller database: each round picks about others."""

    picks: Mapping[int, int]
    groups: int
    rounds: int
    """That count, after one that warms up. A turn has a dozen slowest batches, so its p99 is a noisy figure."""


FULL = Size({32: 4_000, 128: 6_000}, 100_000, 9)
QUICK = Size({32: 400, 128: 600}, 4_400, 3)


def measure(settings: TrustSettings) -> dict[str, Any]:
    """Rates and percentiles with 32 and 128 clients, growth by rows, and what was lost or doubled."""
    folder = settings.folder / "picks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = QUICK if settings.quick else FULL
    load_average = os.getloadavg()[0]
    settings.on_step("picks: rows", 0, 2)
    _fill(folder / "small", size.groups)
    settings.on_step("picks: rows", 1, 2)
    _fill(folder / "large", size.groups, grown=GROWTH)
    load = Load(folder, seed=settings.seed)
    with ExitStack() as running:
        small = running.enter_context(pairloop_server(folder / "small", POLICY))
        large = running.enter_context(pairloop_server(folder / "large", POLICY))
        turns = _turns(settings, load, size, {"small": small, "large": large})
        rss_mb = small.rss_mb
    kept = _kept({name: folder / name for name in ("small", "large")}, load)
    return {**_figures(turns), **kept, "rss_mb": rss_mb, "load_average": load_average, "processors": os.cpu_count()}


def _fill(folder: Path, groups: int, *, grown: int = 1) -> None:
    """A state directory with so many groups without feedback, and, grown, so many times as many that have theirs."""
    write_config(folder / "state", {"policy": {"name": POLICY, "model": "fake", "method": "full"}}, force=True)
    with Store.open(load_config(folder / "state")) as store:
        for part in range(grown):
            store.write(partial(_add_part, part * groups, (part + 1) * groups))


def _add_part(first: int, end: int, c: Connection) -> None:
    add_groups(c, POLICY, first, end, picked=first > 0)


def _turns(
    settings: TrustSettings, load: Load, size: Size, servers: Mapping[str, Server]
) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Round after round; the first warms up and does not count."""
    turns: dict[tuple[str, int], list[dict[str, float]]] = {}
    cells = [("small", 32), ("large", 32), ("small", 128)]
    for number in range(size.rounds + 1):
        for place, (name, clients) in enumerate(cells):
            settings.on_step("picks", number * len(cells) + place, (size.rounds + 1) * len(cells))
            rows = size.groups * (GROWTH if name == "large" else 1)
            figures = load.run(name, servers[name], clients, size.picks[clients], groups=rows)
            if number:
                turns.setdefault((name, clients), []).append(figures)
    return turns


def _figures(turns: Mapping[tuple[str, int], Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds; ``p99_growth_x10``: the share by which ten times the rows change the p99 with 32 clients."""
    found: dict[str, Any] = {}
    for clients in PROMISES:
        for key in ("per_s", "p50_ms", "p99_ms", "cpu_ms"):
            found[f"{key}_{clients}"] = round(median(turn[key] for turn in turns["small", clients]), 3)
    found["p99_ms_32_x10"] = round(median(turn["p99_ms"] for turn in turns["large", 32]), 3)
    found["p99_growth_x10"] = round(found["p99_ms_32_x10"] / found["p99_ms_32"] - 1, 3)
    found["cpu_ms_per_pick"] = found["cpu_ms_128"]
    found["turns"] = {f"{name}_{clients}": list(rows) for (name, clients), rows in turns.items()}
    return found


def _kept(folders: Mapping[str, Path], load: Load) -> dict[str, int]:
    """The picks that were answered against the rows that are there, with both servers ended."""
    acknowledged = lost = doubled = unanswered = 0
    for name, folder in folders.items():
        with Store.open(load_config(folder / "state")) as store, store.reading() as c:
            rows = c.execute(text("SELECT rater_id FROM feedback WHERE rater_id LIKE :like"), {"like": f"{RATER}-%"})
            stored = [rater for (rater,) in rows]
        answered = set(load.acknowledged[name])
        acknowledged += len(answered)
        lost += len(answered - set(stored))
        doubled += len(stored) - len(set(stored))
        unanswered += len(set(stored) - answered)
    return {"acknowledged": acknowledged, "lost": lost, "doubled": doubled, "unanswered": unanswered}


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of ``measure``, below `HEADERS`."""
    told = []
    for clients, promise in PROMISES.items():
        per_s, p99_ms = found[f"per_s_{clients}"], found[f"p99_ms_{clients}"]
        kept = per_s >= promise.per_s and p99_ms < promise.p99_ms
        promised = f"{promise.per_s:,.0f} a second, p99 < {promise.p99_ms:g} ms"
        figures = (f"{per_s:,.0f}", f"{found[f'p50_ms_{clients}']:.1f}", f"{p99_ms:.1f}", f"{found[f'cpu_ms_{clients}']:.2f}")
        told.append((str(clients), *figures, promised, _yes(kept)))
    growth = found["p99_growth_x10"]
    p99 = f"{found['p99_ms_32_x10']:.1f} ({100 * growth:+.0f} %)"
    grown = ("32, ten times the rows", "", "", p99, "", f"p99 ± {percent(MOST_GROWTH)}")
    lost = (f"{found['acknowledged']:,} in all", f"{found['lost']} lost, {found['doubled']} doubled", "", "", "", "0 and 0")
    return [*told, (*grown, _yes(abs(growth) < MOST_GROWTH)), (*lost, _yes(found["lost"] == found["doubled"] == 0))]


def _yes(kept: bool) -> str:
    return "yes" if kept else "NO"
