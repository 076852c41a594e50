"""The database server is killed and started again in the middle of a cycle that two workers turn."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import postgres
from tests.faults_rig import SCENARIOS, Prepared, begin
from tests.postgres import PostgresServer

from pairloop.config import parse_config
from pairloop.errors import UnavailableError
from pairloop.store import Store, triggers
from pairloop.store.clock import shared_now

missing = postgres.missing()
pytestmark = [pytest.mark.faults, pytest.mark.skipif(missing is not None, reason=str(missing))]

KILLS = 3


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    server.start()
    try:
        yield server
    finally:
        server.remove()


def test_a_database_that_is_killed_in_mid_cycle_ends_nothing(server: PostgresServer, tmp_path: Path) -> None:
    """Two workers; a killed server takes their connections with it, and one of them, by chance, in the middle of a commit."""
    expected = Prepared(tmp_path).undisturbed("duel")
    folder, seed = tmp_path / "here", random.SystemRandom().randrange(10**9)
    folder.mkdir()
    (folder / "database").write_text(server.url("postgres"))
    SCENARIOS["duel"].prepare(folder)
    print(f"seed {seed}")
    rng, pause = random.Random(seed), threading.Event()
    lives, killed_under = [begin("duel", folder) for _ in range(2)], 0
    for _ in range(KILLS):
        pause.wait(rng.uniform(0.1, 0.6))
        killed_under += any(life.process.is_alive() for life in lives)
        server.kill()
        server.start_again()
    assert [life.end() for life in lives] == [0, 0], lives[0].log
    assert killed_under > 0
    assert "UnavailableError" in lives[0].log
    assert SCENARIOS["duel"].tell(folder) == expected


def test_a_store_goes_on_with_the_database_that_came_again(server: PostgresServer, tmp_path: Path) -> None:
    config = parse_config({"state_dir": tmp_path, "store": {"database": server.url("postgres")}})
    with Store.open(config) as store:
        before = store.write(shared_now)
        with store.reading() as c:
            assert triggers.peek(c, "bot") is None
        server.kill()
        with pytest.raises(UnavailableError, match="nothing of this was stored"):
            store.write(lambda c: triggers.put(c, "bot", "lost", before))
        with pytest.raises(UnavailableError), store.reading() as c:
            triggers.peek(c, "bot")
        server.start_again()
        assert store.write(shared_now) > before  # at once: a connection is tried before it is used
        with store.reading() as c:
            assert triggers.peek(c, "bot") is None
