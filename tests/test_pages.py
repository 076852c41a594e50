"""The curve of versions as numbers, and the pages as text: escaped, self-contained, guarded by their headers."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import pytest
from tests.server import POLICY, RunningServer

from pairloop.store import cycles, feedback, verdicts
from pairloop.types import Alias, Cycle, CycleState, CycleStep, Label, Reason, Verdict, VerdictKind
from pairloop.web.curve import Contest, curve
from pairloop.web.curve_plot import versions_plot
from pairloop.web.plots import draw

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def server(serve: Callable[..., RunningServer]) -> RunningServer:
    return serve()


def test_one_duel_tells_the_same_against_champion_and_base() -> None:
    (point,) = curve([Contest(1, 0, wins=60, losses=40, ties=0, verdict="PROMOTE")])
    assert point.rate.mean == pytest.approx(0.6)
    assert point.against_base.mean == pytest.approx(60.5 / 101)
    assert point.rate.lo == pytest.approx(point.against_base.lo, abs=0.01)
    assert point.rate.hi == pytest.approx(point.against_base.hi, abs=0.01)
    assert 0.5 < point.rate.lo < 0.6 < point.rate.hi < 0.7


def test_strength_adds_up_along_the_chain_of_champions() -> None:
    first, second, third = curve(
        [
            Contest(1, 0, wins=75, losses=25, ties=0, verdict="PROMOTE"),
            Contest(2, 1, wins=40, losses=60, ties=0, verdict="REJECT"),
            Contest(3, 1, wins=60, losses=20, ties=20, verdict="PROMOTE"),
        ]
    )
    odds = (75.5 / 25.5) * (70.5 / 30.5)
    assert third.against_base.mean == pytest.approx(odds / (1 + odds))
    assert second.against_base.mean < first.against_base.mean < third.against_base.mean
    assert third.rate.mean == pytest.approx(0.7)  # ties half
    assert third.against_base.hi - third.against_base.lo > 0


def test_what_was_compared_with_a_champion_of_unknown_strength_says_nothing_about_the_base() -> None:
    known, after = curve([Contest(8, 7, 60, 40, 0, "PROMOTE"), Contest(9, 8, 60, 40, 0, "PROMOTE")])
    assert (known.against_base.lo, known.against_base.hi) == (0.0, 1.0)
    assert (after.against_base.lo, after.against_base.hi) == (0.0, 1.0)
    assert known.rate.lo > 0.5


def test_an_empty_duel_is_all_doubt_and_the_curve_stays_in_its_box() -> None:
    points = curve([Contest(number, 0, 0, 0, 0, None) for number in range(1, 41)])
    assert (points[0].rate.lo, points[0].rate.hi) == (0.0, 1.0)
    drawing = draw(versions_plot(points, history=(), details={}, by="version", champion=0))
    dots = [dot for one in drawing.drawn for dot in one.dots]
    assert len(dots) == 40
    for dot in dots:
        assert drawing.left <= dot.x <= drawing.right
        assert drawing.top <= dot.y <= drawing.bottom
        assert dot.y_lo is None  # nobody compared it: no interval is drawn
    assert draw(versions_plot([], history=(), details={}, by="time", champion=0)).drawn == ()


class Collector(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_guarded(server: RunningServer) -> None:
    for path in ("/", "/docs"):
        response = server.http.get(path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        for tag, attributes in Collector(response.text).tags:
            assert not [name for name in attributes if name.startswith("on") or name == "style"]
            if tag == "script":
                assert attributes.get("src")
            for name in ("src", "href"):
                address = attributes.get(name) or ""
                assert not re.match(r"(https?:)?//|data:|javascript:", address)
                if address.startswith("/static/"):
                    assert server.http.get(address.split("#")[0]).status_code == 200


def test_the_visitor_keeps_an_id_and_a_forged_one_is_replaced(server: RunningServer) -> None:
    first = server.http.get("/")
    visitor = first.cookies["pairloop_visitor"]
    assert f'data-visitor="{visitor}"' in first.text
    cookie = first.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    again = server.http.get("/")  # the client sends its cookie
    assert f'data-visitor="{visitor}"' in again.text
    assert "set-cookie" not in again.headers
    server.http.cookies.set("pairloop_visitor", f'"{EVIL}"')
    forged = server.http.get("/")
    assert EVIL not in forged.text
    assert "set-cookie" in forged.headers


def judged(server: RunningServer) -> None:
    server.add_version(1)
    duel = server.open_duel(1)
    reasons = (
        Reason("evidence", True, f"E reached 20 {EVIL}", 21.0, 20.0),
        Reason("length", False, "answers grew by 60 %", 1.6, 1.4),
        Reason("picks", None, "12 more picks are needed"),
    )
    verdict = Verdict(VerdictKind.PROMOTE, reasons, e_value=21.0, wins=30, losses=10, ties=4, raters=12)
    server.store.write(lambda c: verdicts.insert(c, duel.cycle_id, duel.duel_id, verdict, datetime.now(UTC)))
    server.close_duel(duel, CycleState.PROMOTED, {"reason": "x"})
    server.alias(Alias.CHAMPION, 1)


def test_verdicts_and_the_curve_are_shown_and_escaped(server: RunningServer) -> None:
    judged(server)
    live, curve_text = server.http.get("/page/live").text, server.http.get("/versions").text
    assert EVIL not in live
    assert "&lt;script&gt;" in live
    assert "PROMOTE" in live
    for text in ("answers grew by 60 %", "12 more picks are needed", f"champion {POLICY}@1"):
        assert text in live
    classes = [attributes.get("class") for tag, attributes in Collector(live).tags if tag == "li"]
    assert classes[-3:] == ["passed", "failed", "open"]
    assert "73 % (58–84)" in curve_text
    assert "@1, promoted" in curve_text
    assert EVIL not in curve_text


def test_a_running_cycle_shows_its_stage_and_progress(server: RunningServer) -> None:
    server.add_version(1)
    server.open_duel(1)
    live = server.http.get("/page/live").text
    assert "is <strong>duelling</strong>: 0 picks, about" in live
    stages = [attributes["class"] for tag, attributes in Collector(live).tags if tag == "li"][:4]
    assert stages == ["done", "done", "done", "now"]
    progress: Any = next(attributes for tag, attributes in Collector(live).tags if tag == "progress")
    assert int(progress["value"]) == 0 < int(progress["max"])


def test_the_training_round_says_why_it_stopped(server: RunningServer) -> None:
    server.add_version(1)
    result = {"steps": 9, "steps_planned": 12, "stopped_because": "ess", "stop_message": f"it ran out {EVIL}"}
    trained = CycleStep(
        CycleState.CHECKING,
        {"version": 1, "result": {**result, "metrics": {"ess_mean": 0.64, "ess_min": 0.31}}},
        datetime.now(UTC),
    )
    ended = CycleStep(CycleState.HELD, {"reason": "x"}, datetime.now(UTC))
    began = CycleStep(CycleState.BUILDING, {"parent": 0}, datetime.now(UTC))
    cycle = Cycle("cycle_1", POLICY, 1, 0, "test", datetime.now(UTC), (began, trained, ended))
    server.store.write(lambda c: cycles.insert(c, cycle))
    live = server.http.get("/page/live").text
    assert EVIL not in live
    assert "Training round, cycle 1, version 1: it ran out &lt;script&gt;" in live
    assert "ESS 0.64 on average, 0.31 at least" in live
    round_ = server.http.get("/v1/status").json()["last_round"]
    assert (round_["stopped_because"], round_["steps"], round_["kl_base"]) == ("ess", 9, None)


def test_an_idle_loop_says_what_it_waits_for(server: RunningServer) -> None:
    live = server.http.get("/page/live").text
    assert "0 new pairs of the 500 that start the next cycle" in live
    assert "The gate has not spoken yet" in live
    assert "Training round" not in live
    assert "No version has been compared" in server.http.get("/versions").text


def test_docs_name_every_route_with_its_fields(server: RunningServer) -> None:
    docs = server.http.get("/docs").text
    for path in server.http.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in docs
    for field in ("chosen_index", "shown_order", "metric_name", "max_completion_tokens"):
        assert f"<code>{field}</code>" in docs


def test_docs_show_code_that_runs_against_this_server(server: RunningServer) -> None:
    found = re.search(r"<pre><code>(from openai .*?)</code></pre>", server.http.get("/docs").text, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = {}
    exec(html.unescape(found[1]), values)
    assert len(values["reply"].choices) == 2
    with server.store.reading() as c:
        (given,) = feedback.recent(c, POLICY, 2)
    assert given.label is Label.A


def test_a_mistyped_address_is_a_page_for_a_browser_and_json_for_a_program(server: RunningServer) -> None:
    browser = {"accept": "text/html,application/xhtml+xml"}
    reply = server.http.get("/status<b>", headers=browser)
    assert (reply.status_code, reply.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "There is no page /status&lt;b&gt; here." in reply.text
    assert 'href="/versions"' in reply.text  # the menu is there
    assert server.http.get("/status").json()["error"]["code"] == "not_found"
    assert server.http.get("/v1/status<b>", headers=browser).json()["error"]["code"] == "not_found"
    assert server.http.post("/status", headers=browser).json()["error"]["code"] == "not_found"


def test_an_open_page_is_told_when_the_loop_moves(server: RunningServer) -> None:
    """The stream says ``moved`` at once and again when the champion changed; it ends with the server."""
    with server.http.stream("GET", "/page/events") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in reply.iter_lines() if line.startswith("event"))
        assert next(lines) == "event: moved"
        judged(server)
        assert next(lines) == "event: moved"
