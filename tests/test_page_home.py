"""Home as text: the lane and its estimate, the figures, the alarms, and what a fresh install is told to do."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server import POLICY, RunningServer, user_of
from tests.test_page_versions import trained

from pairloop.loop import deploy
from pairloop.loop.cycle import CycleStatus
from pairloop.loop.cycle.status import Progress
from pairloop.store import counts, cycles, feedback, quarantines
from pairloop.store.quarantines import Action, Quarantine
from pairloop.types import Cycle, CycleState, CycleStep, Label, Pool
from pairloop.web.alarms import alarms
from pairloop.web.overview import Overview, lane_of, left_s, quantile
from pairloop.web.status import Status

EVIL = "<script>alert('x')</script>"
INF = float("inf")


@pytest.fixture
def server(serve: Callable[..., RunningServer]) -> RunningServer:
    return serve()


def read(server: RunningServer) -> tuple[Status, Overview]:
    context = server.app.state.context
    status = context.board.read()
    return status, context.overview.read(status)


def test_a_fresh_install_says_what_to_do_first(server: RunningServer) -> None:
    fresh = server.http.get("/home").text
    for part in (
        f'base_url="{server.url}/v1"',
        f'model="{POLICY}"',
        "pairloop data import",
        "no chat since this server started",
    ):
        assert part in fresh


def test_once_somebody_asked_there_are_figures_in_its_place(server: RunningServer) -> None:
    pick = {"inference_id": server.chat(n=2, user=user_of(Pool.TRAIN)).json()["id"], "outcome": "tie", "latency_ms": 4_000}
    server.http.post("/v1/preferences", json=pick).raise_for_status()
    status, found = read(server)
    assert found.picks_today == 1
    assert found.latency.n == 1
    assert found.latency.p50_s is not None
    text = server.http.get("/home").text
    assert "Nothing has been asked yet" not in text
    assert "1 since this server started" in text
    assert status.group_count == 1


def test_the_snippet_on_the_page_runs(server: RunningServer) -> None:
    """What is copied works as it is: the text between the tags, unescaped, in Python."""
    found = re.search(r'<pre id="snippet" tabindex="0">(.*?)</pre>', server.http.get("/home").text, re.DOTALL)
    assert found is not None
    values: dict[str, object] = {}
    exec(html.unescape(found[1]), values)
    assert len(values["reply"].choices) == 2  # type: ignore[attr-defined]
    with server.store.reading() as c:
        assert [one.label for one in feedback.recent(c, POLICY, 2)] == [Label.A]


def test_the_lane_shows_where_the_cycle_is_and_an_estimate_of_what_is_left(server: RunningServer) -> None:
    server.add_version(1)
    server.open_duel(1)
    status, _ = read(server)
    assert [(step.word, step.when) for step in lane_of(status.now, None)] == [
        ("collect", "done"),
        ("pairs", "done"),
        ("train", "done"),
        ("evaluate", "done"),
        ("gate", "now"),
        ("deploy", "todo"),
    ]
    text = server.http.get("/home").text
    assert "time left: –" in text  # no pick yet: nothing to estimate it from
    now = datetime.now(UTC)
    half = moving(status.now, Progress(30, 90), now - timedelta(minutes=2))
    assert left_s(half, now) == pytest.approx(240)
    assert left_s(moving(half, Progress(0, 90), now), now) is None
    assert left_s(replace(half, progress=None), now) is None


def moving(now: CycleStatus, progress: Progress, since: datetime) -> CycleStatus:
    return replace(now, progress=progress, since=since)


def test_a_quantile_lies_where_the_counts_say() -> None:
    bars = {0.1: 50.0, 0.2: 90.0, 1.0: 99.0, INF: 100.0}
    assert quantile(bars, 0.5) == pytest.approx(0.1)
    assert quantile(bars, 0.7) == pytest.approx(0.15)
    assert quantile(bars, 0.99) == pytest.approx(1.0)
    assert quantile(bars, 0.995) is None  # beyond the last bound: not known
    assert quantile({}, 0.5) is None


@settings(max_examples=40)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.floats(0.01, 0.99))
def test_quantiles_rise_and_keep_within_their_bar(counts: list[int], q: float) -> None:
    bounds = [*map(float, range(1, len(counts))), INF]
    running, bars = 0.0, {}
    for bound, count in zip(bounds, counts, strict=True):
        running += count
        bars[bound] = running
    at, later = quantile(bars, q), quantile(bars, min(0.99, q + 0.2))
    if at is not None:
        bar = next(bound for bound in bounds if bars[bound] >= q * running)
        assert bar - 1 <= at <= bar
        assert later is None or later >= at


def ended(server: RunningServer, number: int, state: CycleState, reason: str) -> None:
    at = datetime.now(UTC)
    steps = (CycleStep(CycleState.BUILDING, {"parent": 0}, at), CycleStep(state, {"reason": reason}, at))
    server.store.write(lambda c: cycles.insert(c, Cycle(f"cycle_{number}", POLICY, number, 0, "test", at, steps)))


def test_alarms_are_words_with_a_way_on_and_are_escaped(server: RunningServer) -> None:
    for number in (1, 2):
        ended(server, number, CycleState.HELD, "undecided")
    ended(server, 3, CycleState.REJECTED, "worse")
    server.add_version(1)
    deploy.promote_by_hand(server.store, server.policy, POLICY, number=1, reason="x")
    reason = f"a live guard broke: errors {EVIL}"
    deploy.rollback(server.store, POLICY, reason=reason)
    decision = Quarantine("somebody", Action.QUARANTINE, "always the left one", datetime.now(UTC))
    server.store.write(lambda c: quarantines.insert(c, POLICY, decision))
    text = server.http.get("/home").text
    assert EVIL not in text
    for part in (
        "The last 3 cycles brought no promotion",
        "@1 was rolled back to @0",
        "&lt;script&gt;",
        "of 1 raters are set aside",
    ):
        assert part in text
    assert '<a href="/versions/1">Look into it</a>' in text
    status, found = read(server)
    later = datetime.now(UTC) + timedelta(days=8)
    assert not [one for one in alarms(status, found, draining=False, now=later) if "was rolled back" in one.text]


def test_a_promotion_ends_the_row_and_a_failure_is_told_with_its_reason(server: RunningServer) -> None:
    for number in (1, 2):
        ended(server, number, CycleState.HELD, "undecided")
    ended(server, 3, CycleState.PROMOTED, "won")
    ended(server, 4, CycleState.FAILED, f"training failed: {EVIL}")
    text = server.http.get("/home").text
    assert "brought no promotion" not in text
    assert "Cycle 4 failed: training failed: &lt;script&gt;" in text


def test_what_the_scheduler_and_the_machine_say_becomes_an_alarm(server: RunningServer) -> None:
    status, found = read(server)
    assert [one for one in alarms(status, replace(found, readings={}), draining=False) if one.level == "bad"] == []
    broken = {"running": True, "error": "the watch cannot act"}
    readings = {
        ("disk_free_ratio", "state"): 0.02,
        ("disk_free_ratio", "artifacts"): 0.02,
        ("lease_expires_in_seconds", "cycle:bot"): -90.0,
        ("writes_waiting", ""): 5_000.0,
        ("key_expires_in_seconds", ""): 3_600.0,
        ("store_up", ""): 0.0,
    }
    paused = replace(status, now=replace(status.now, enabled=False), scheduler=broken)
    told = alarms(paused, replace(found, readings=readings), draining=True)
    texts = "\n".join(one.text for one in told)
    for part in (
        "The loop is in trouble: the watch cannot act",
        "about to stop",
        "The schedule is paused",
        "The disk of the artifacts and state folders has 2 % left",
        "The lease cycle:bot ran out 90 s ago",
        "5,000 writes wait",
        "expires in 0.0 days",
        "The database cannot be read",
    ):
        assert part in texts
    levels = [one.level for one in told]
    assert levels == sorted(levels)  # the bad ones first
    stopped = alarms(replace(status, scheduler={"running": False}), found, draining=False)
    assert any("Nothing turns the loop" in one.text for one in stopped)


def test_picks_of_today_are_counted_once_however_often_revised(server: RunningServer) -> None:
    reply = server.chat(n=2, user=user_of(Pool.TRAIN)).json()
    for index in (0, 1):
        pick = {"inference_id": reply["id"], "outcome": "chosen", "chosen_index": index, "latency_ms": 4_000}
        assert server.http.post("/v1/preferences", json=pick).status_code in (200, 201)
    with server.store.reading() as c:
        assert counts.picks_since(c, POLICY, datetime.now(UTC) - timedelta(hours=1)) == 1
        assert counts.picks_since(c, POLICY, datetime.now(UTC) + timedelta(hours=1)) == 0


def test_the_lane_says_what_the_steps_behind_came_to(server: RunningServer) -> None:
    trained(server, "an answer")
    status, _ = read(server)
    (view,) = status.cycles
    told = {step.word: step.text for step in lane_of(status.now, view.cycle)}
    assert told["pairs"] == "412 to train on, 0 held out"
    assert told["train"] == "@1, 9 steps"
    assert told["evaluate"] == "32 samples on 8 prompts"
