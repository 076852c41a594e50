"""Parts of `pairloop bench trust` in small: real servers under load, and figures that can tell a fault."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection
from tests.store_rows import NOW, a_cycle, a_group, a_pick, put_groups, put_picks

from pairloop.bench import trust_kills, trust_loops, trust_memory, trust_soak, trust_swap
from pairloop.bench.trust import PARTS, TrustSettings, part
from pairloop.config import parse_config
from pairloop.statistics import binomial_tail
from pairloop.store import Store, cycles, groups
from pairloop.types import Completion, CycleState, CycleStep, FinishReason, Group, GroupKind


def quick(folder: Path) -> TrustSettings:
    return TrustSettings(folder, lambda *_: None, quick=True, duels=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swap", "soak"])
def test_a_part_measures_and_is_told_in_a_table(tmp_path: Path, name: str) -> None:
    found = part(name).measure(quick(tmp_path))
    assert found["failed"] == 0, found["failures"]
    assert found["requests"] > 100
    if name == "swap":
        assert (found["mixed"], found["one_sided_duels"]) == (0, 0)
        assert found["duel_groups"] > 0
    else:
        assert found["problems"] == []
        assert found["cycles"] > 0
        assert len(found["p99_ms"]) == 10
        memory = found["memory"]
        assert 0 < memory["first_mb"] < memory["peak_mb"]
        assert len(memory["rss_mb"]) == len(memory["sqlite_mb"]) == 10
        assert 0 < memory["sqlite_mb"][0] < memory["rss_mb"][0] <= memory["peak_mb"]
        assert set(found["refused"]) <= {"store_busy"}
    (row,) = part(name).rows(found)
    assert len(row) == len(part(name).headers)


def test_planted_fault_groups_that_mix_versions_are_counted(tmp_path: Path) -> None:
    config = parse_config({"state_dir": tmp_path, "policy": {"model": "fake", "method": "full"}})
    with Store.open(config) as store:
        for number, kind in enumerate((GroupKind.TRAIN, GroupKind.HELDOUT, GroupKind.TRAIN)):
            versions = (0, 0) if number == 2 else (0, 1)
            group = _group(f"g{number}", kind, versions)
            store.submit(partial(groups.insert, group=group)).result()
        assert trust_swap.count_mixed(store, config) == (2, 0, 0)


def test_planted_fault_picks_that_are_lost_doubled_or_changed_are_counted(tmp_path: Path) -> None:
    config = parse_config({"state_dir": tmp_path, "policy": {"model": "fake", "method": "full"}})
    with Store.open(config) as store:
        put_groups(store, a_group("1"), a_group("2"))
        ids = [group.group_id for group in (a_group("1"), a_group("2"))]
        put_picks(
            store,
            a_pick(ids[0], feedback_id="kept"),
            a_pick(ids[1], feedback_id="changed"),
            a_pick(ids[1], feedback_id="doubled", rater="sam"),
        )
    told = {"kept": (ids[0], 0), "changed": (ids[1], 1), "lost": (ids[0], 0)}
    found = trust_kills.count(config, trust_kills.Tally(told))
    assert (found["acknowledged"], found["lost"], found["doubled"], found["changed"]) == (3, 1, 1, 1)
    assert len(trust_kills.rows({**found, "kills": 1, "sent_again": 0})[0]) == len(trust_kills.HEADERS)


def test_every_cycle_of_a_soak_is_counted(tmp_path: Path) -> None:
    config = parse_config({"state_dir": tmp_path, "policy": {"model": "fake", "method": "full"}})
    with Store.open(config) as store:

        def many(c: Connection) -> None:
            for number in range(1, 131):
                cycles.insert(c, a_cycle(number, "bot"))
                cycles.step(c, f"cycle_bot_{number}", CycleStep(CycleState.PROMOTED, {}, NOW))
            cycles.insert(c, a_cycle(131, "bot"))

        store.write(many)
        assert trust_soak.ends_of_cycles(store, "bot") == {"promoted": 130, "building": 1}


@pytest.mark.parametrize(("refusals", "status"), [(0, 200), (2, 200), (3, 503)])
def test_a_client_of_the_soak_comes_again_when_it_is_told_to(refusals: int, status: int) -> None:
    left = [refusals]

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            left[0] -= 1
            answer = body if left[0] < 0 else b'{"error": {"code": "store_busy"}}'
            self.send_response(200 if left[0] < 0 else 503)
            self.send_header("retry-after", "0")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    async def ask(url: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=trust_soak.Patient(refused)) as http:
            return await http.post(url, json={"pick": 1})

    refused: Counter[str] = Counter()
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        reply = asyncio.run(ask(f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
        thread.join()
    assert reply.status_code == status
    assert refused["store_busy"] == min(refusals, trust_soak.TRIES - 1)
    assert status == 503 or reply.json() == {"pick": 1}


FLAT = [150.0, 220.0, *(280.0 + noise for noise in (0.4, -0.6, 0.2, 0.5, -0.3, -0.1, 0.3, -0.4))]
LEAKING = [
    150.0,
    220.0,
    *(280.0 + 3.0 * step + noise for step, noise in enumerate((0.4, -0.6, 0.2, 0.5, -0.3, -0.1, 0.3, -0.4))),
]


def _memory(rss_mb: list[float], sqlite_mb: float = 90.0) -> trust_memory.Memory:
    """Ten readings in each tenth of the time, after the one before the load."""
    return trust_memory.Memory(
        [120.0, *(one for one in rss_mb for _ in range(10))], [5.0] + 100 * [sqlite_mb], peak_mb=max(rss_mb) + 7
    )


def test_memory_that_came_with_the_warm_up_is_no_growth_but_is_told() -> None:
    found = trust_memory.figures(_memory(FLAT), 30.0)
    value, low, high = found["growth"]["mb_per_hour"]
    assert low < 0 < high
    assert abs(value) < 2
    assert (found["first_mb"], found["peak_mb"], found["rss_mb"][0]) == (120.0, 287.5, 150.0)
    where, words = trust_memory.told(found)
    assert where == (
        "120 at the start, 280 in the tenth after 6 minutes of warm-up, 280 in the last one "
        "(of it SQLite's: 90, then 90); peak 288"
    )
    assert "%" in words


def test_planted_fault_a_leak_is_told_with_an_interval_above_nothing() -> None:
    found = trust_memory.figures(_memory(LEAKING), 30.0)
    for kind in ("growth", "growth_without_sqlite"):
        value, low, high = found[kind]["mb_per_hour"]
        assert 50 < low < 60 < high < 70  # 3 MB in each of ten tenths of half an hour
        assert low < value < high
    assert found["growth"]["percent"][0] == pytest.approx(100 * 21 / 280, abs=0.5)


def test_what_sqlite_takes_is_told_apart() -> None:
    memory = _memory(LEAKING)
    memory.sqlite_mb = [one - 100 for one in memory.rss_mb]
    found = trust_memory.figures(memory, 30.0)
    assert found["growth"]["mb_per_hour"][1] > 50
    assert found["growth_without_sqlite"]["mb_per_hour"] == [0.0, 0.0, 0.0]


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=30), st.floats(-50, 50))
def test_the_slope_is_that_of_least_squares_and_moves_with_what_is_added(values: list[float], added: float) -> None:
    line = trust_memory.slope(values)
    assert line.lo <= line.mean <= line.hi
    assert line.mean == pytest.approx(np.polyfit(range(len(values)), values, 1)[0], abs=1e-6)
    steeper = trust_memory.slope([one + added * step for step, one in enumerate(values)])
    assert steeper.mean == pytest.approx(line.mean + added, abs=1e-6)
    assert steeper.hi - steeper.lo == pytest.approx(line.hi - line.lo, abs=1e-4)


def test_the_interval_of_a_slope_holds_the_truth_nineteen_times_in_twenty() -> None:
    rng, held = random.Random(7), 0
    for _ in range(2_000):
        line = trust_memory.slope([0.3 * step + rng.gauss(0, 1) for step in range(8)])
        held += line.lo <= 0.3 <= line.hi
    assert 1_860 <= held <= 1_940  # 95 % of 2,000, give or take three standard errors


def _group(group_id: str, kind: GroupKind, versions: tuple[int, int]) -> Group:
    answers = tuple(Completion("hi", (1,), (-0.5,), version, FinishReason.STOP) for version in versions)
    return a_group(group_id, policy="support-bot", kind=kind, completions=answers)


def test_the_bound_of_random_loops_is_that_of_the_binomial() -> None:
    assert trust_loops.bound(80, 0.05) == 8
    assert binomial_tail(9, 80, 0.05) < 0.025 <= binomial_tail(8, 80, 0.05)


def test_every_part_is_known() -> None:
    assert all(len(part(name).headers) > 3 for name in PARTS)
    with pytest.raises(ValueError, match="no part 'x'"):
        part("x")
