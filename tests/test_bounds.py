"""What a serving process remembers has a bound: it does not grow with the users, versions, duels or methods it ever saw."""

from __future__ import annotations

import asyncio
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.faulty_policy import service
from tests.server import POLICY, RunningServer, World, fake_config

from pairloop.errors import EngineError
from pairloop.loop.gate import evidence
from pairloop.loop.serve.recorder import HEARD, MOST_OF_ONE
from pairloop.loop.serve.service import ROWS
from pairloop.store import traffic
from pairloop.web.allocator import ARENAS


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path / "world", config=fake_config(tmp_path)) as world:
        yield world


def test_of_users_that_were_heard_the_last_ones_are_kept_and_one_who_asks_all_day_stays_one_witness(world: World) -> None:
    recorder, start = service(world).recorder, datetime.now(UTC) - timedelta(minutes=2)
    others = HEARD + 500
    for number in range(others):
        recorder.failed(0, f"user-{number}", EngineError("down"))
        if number % 100 == 0:
            recorder.failed(0, "who asks all day", EngineError("down"))
    assert len(recorder._heard) == HEARD
    written = recorder.flush()
    assert written is not None
    written.result()
    with world.store.reading() as c:
        found = traffic.by_minute(c, POLICY, 0, start, datetime.now(UTC) + timedelta(minutes=2))
    errors = sum(counts.errors for counts in found.values())
    assert others + MOST_OF_ONE <= errors <= others + 2 * MOST_OF_ONE  # twice where the hour ended in between


def test_rows_of_versions_are_kept_up_to_a_bound(world: World) -> None:
    chat = service(world)
    for number in range(1, ROWS + 3):
        world.add_version(number)

    async def ask() -> list[int]:
        return [(await chat.version(number)).number for number in [*range(ROWS + 3), 0]]

    assert asyncio.run(ask()) == [*range(ROWS + 3), 0]
    assert len(chat._rows) == ROWS


@pytest.mark.sqlite("its pool of readers")
def test_the_reader_that_was_given_back_last_is_taken_first(world: World) -> None:
    """So that of many connections few keep their statements compiled."""
    with world.store.reading() as first, world.store.reading() as second:
        last_given_back = first.connection.driver_connection
        assert second.connection.driver_connection is not last_given_back
    for _ in range(3):
        with world.store.reading() as c:
            assert c.connection.driver_connection is last_given_back


def test_borders_of_past_duels_are_forgotten() -> None:
    """Lifetime spending gives each duel an alpha of its own."""
    for duel in range(1, 101):
        evidence.border(0.05 / duel)
    assert evidence.border.cache_info().currsize <= evidence.BORDERS
    assert evidence.border(0.05 / 100) is evidence.border(0.05 / 100)


def test_a_method_of_the_clients_own_makes_no_series_of_its_own(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    assert server.http.request("PROPFIND", "/v1/status").status_code == 405
    text = server.http.get("/metrics").text
    assert "PROPFIND" not in text
    assert 'method="other"' in text


ALLOCATING = """
import ctypes, sys, threading
from pairloop.web.allocator import share_arenas
if sys.argv[1] == "shared":
    share_arenas()
together = threading.Barrier(8)
def work():
    together.wait()
    kept = [bytearray(2_000) for _ in range(100)]
    together.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no arenas")
def test_threads_share_two_arenas_of_the_c_library() -> None:
    def arenas(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", ALLOCATING, how], capture_output=True, text=True, check=True, timeout=60)
        return len(re.findall(r"^Arena \d+:$", done.stderr, re.MULTILINE))

    assert arenas("shared") == ARENAS
    assert arenas("not") > ARENAS
