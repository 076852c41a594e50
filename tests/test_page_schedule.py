"""The schedule: what starts a cycle, where each setting comes from, how long the steps took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.server import POLICY, RunningServer, fake_config

from pairloop.config import load_config, override, set_by
from pairloop.store import cycles, leases
from pairloop.types import Cycle, CycleState, CycleStep
from pairloop.web.pages.schedule import laps

NOON = datetime(2026, 5, 31, 12, tzinfo=UTC)
EVIL = "<script>alert('x')</script>"


class Turning:
    """A scheduler that says what it is told to say, and turns nothing."""

    def __init__(self, **says: Any) -> None:
        self.says: Mapping[str, Any] = {"running": True, "error": None, **says}

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def notify(self) -> None: ...

    def status(self) -> Mapping[str, Any]:
        return self.says


def cycle(number: int, *steps: tuple[CycleState, float], trigger: str = EVIL) -> Cycle:
    """A cycle whose steps were entered so many seconds after noon."""
    moves = tuple(CycleStep(state, {}, NOON + timedelta(seconds=at)) for state, at in steps)
    return Cycle(f"cycle_{number}", POLICY, number, 0, trigger, NOON, moves)


def test_durations_are_those_between_the_steps() -> None:
    done = cycle(1, (CycleState.BUILDING, 0), (CycleState.TRAINING, 10), (CycleState.CHECKING, 40), (CycleState.REJECTED, 50))
    open_ = cycle(2, (CycleState.BUILDING, 0), (CycleState.TRAINING, 5))
    ended, running = laps([done, open_], NOON + timedelta(seconds=30))
    assert [(part.state, part.seconds) for part in ended.parts] == [("building", 10), ("training", 30), ("checking", 10)]
    assert [(part.x, part.width) for part in ended.parts] == [(0, 20), (20, 60), (80, 20)]
    assert [(part.state, part.seconds) for part in running.parts] == [("building", 5), ("training", 25)]
    assert (ended.seconds, running.seconds) == (50, 30)
    assert laps([], NOON) == []


def test_where_a_setting_comes_from(tmp_path: Path) -> None:
    (tmp_path / "pairloop.toml").write_text("[gate]\nalpha = 0.02\n")
    env = {"PAIRLOOP_SCHEDULE_EVERY": "6h"}
    config = override(load_config(tmp_path, env=env), {"serve": {"port": 0}})
    assert set_by(config, "gate", "alpha", env=env) == "file"
    assert set_by(config, "gate", "min_picks", env=env) is None
    assert set_by(config, "schedule", "every", env=env) == "PAIRLOOP_SCHEDULE_EVERY"
    assert set_by(config, "serve", "port", env=env) == "file"
    assert (config.gate.alpha, config.schedule.every, config.serve.port) == (0.02, "6h", 0)
    assert override(config, {"gate": {"alpha": 0.01}}).schedule.every == "6h"


def test_the_page_says_what_is_due_and_why(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    config = fake_config(tmp_path / "c", schedule={"min_pairs": 7, "every": "6h"}, gate={"alpha": 0.02})
    server = serve(config=config, scheduler=Turning())
    page = server.http.get("/schedule").text
    assert "0 of 7" in page
    assert "in 6 h" in page
    assert "No cycle yet" in page
    assert "alpha = 0.02" in page.split('id="settings"')[1]
    assert "nothing waits to begin" in page
    assert "/cancel" not in page
    asked = server.http.post("/v1/cycles", json={"reason": EVIL})
    assert asked.status_code == 202
    server.store.write(lambda c: cycles.insert(c, cycle(1, (CycleState.BUILDING, 0), (CycleState.HELD, 90))))
    now = datetime.now(UTC)
    server.store.write(lambda c: leases.acquire(c, f"cycle:{POLICY}", "host:1/lease_1", now=now, ttl_s=60))
    page = fresh(server)
    assert EVIL not in page
    assert "<small>&lt;script&gt;alert" in page  # the pending trigger
    assert "1.5 min" in page
    assert "host:1" in page
    assert "unless renewed" in page
    server.store.write(lambda c: cycles.insert(c, cycle(2, (CycleState.BUILDING, 0))))
    assert 'data-api="POST /v1/cycles/cycle_2/cancel"' in fresh(server)
    assert server.http.post("/v1/cycles/cycle_2/cancel", json={"reason": "no"}).status_code == 200
    assert "/cancel" not in fresh(server)


def fresh(server: RunningServer) -> str:
    """The page once the board has forgotten what it read before."""
    server.app.state.context.board._read_at = float("-inf")
    return server.http.get("/schedule").text


def test_a_loop_that_nobody_turns_is_said(serve: Callable[..., RunningServer]) -> None:
    turning = Turning()
    server = serve(scheduler=turning)
    told = "This process does not turn the loop", "thread has ended", "ran into trouble"
    assert not [words for words in told if words in fresh(server)]
    turning.says = {"running": False, "error": EVIL}
    page = fresh(server)
    assert [words for words in told if words in page] == [*told[1:]]
    assert EVIL not in page
    server.app.state.context.scheduler = None
    assert told[0] in fresh(server)
    server.app.state.context.scheduler = turning
