"""The curve as a plot, the list of versions, and one version's page, as text: figures, marks, hostile words, bad parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection
from tests.server import POLICY, RunningServer

from pairloop.loop import deploy
from pairloop.store import cycles, datasets, duels, groups, runs, verdicts, versions
from pairloop.store.versions import Promotion
from pairloop.types import (
    Alias,
    Completion,
    Cycle,
    CycleState,
    CycleStep,
    Dataset,
    Duel,
    Group,
    GroupKind,
    Interval,
    Message,
    Pool,
    Reason,
    Run,
    RunStatus,
    Verdict,
    VerdictKind,
    Version,
    VersionKind,
)
from pairloop.web.curve import Contest, curve
from pairloop.web.curve_plot import Details, Fate, fate_of, moves, versions_plot
from pairloop.web.lineage import TEXT_SHOWN, differences
from pairloop.web.plots import Plot, draw

EVIL = "<script>alert('x')</script></textarea>"
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
VERDICTS = ("PROMOTE", "HOLD", "REJECT", None)


def moved(number: int, previous: int | None, action: Any = "promote", reason: str = "it won") -> Promotion:
    return Promotion(POLICY, number, previous, action, reason, None, NOW)


def contests() -> list[Contest]:
    return [
        Contest(1, 0, 60, 40, 0, "PROMOTE", NOW),
        Contest(2, 1, 70, 30, 0, "PROMOTE", NOW + timedelta(hours=1)),
        Contest(3, 1, 55, 45, 0, "HOLD", NOW + timedelta(hours=2)),
        Contest(4, 1, 0, 0, 0, "REJECT", NOW + timedelta(hours=8)),
    ]


def plot(history: list[Promotion], by: Any = "version", details: dict[int, Details] | None = None) -> Plot:
    return versions_plot(curve(contests()), history=history, details=details or {}, by=by, champion=1)


def test_each_mark_says_what_became_of_its_version_and_the_line_keeps_to_those_in_office() -> None:
    history = [moved(1, 0), moved(2, 1), moved(1, 2, "rollback")]
    drawn = {one.name: one for one in plot(history).series}
    marks = {name: [p.href for p in one.points] for name, one in drawn.items() if name.endswith("against the base")}
    assert marks == {
        "promoted, against the base": ["/versions/1"],
        "held, against the base": ["/versions/3"],
        "rejected, against the base": ["/versions/4"],
        "rolled back, against the base": ["/versions/2"],
    }
    assert len({(drawn[name].tone, drawn[name].shape) for name in marks}) == 4
    assert [p.x for p in drawn["champions"].points][1:] == [1.0]  # the base, and version 1: 2 was taken back
    by_hand = {one.name: one for one in plot([moved(1, 0), moved(3, 1)]).series}
    assert [p.x for p in by_hand["champions"].points][1:] == [1.0, 3.0]
    assert [p.href for p in by_hand["promoted, against the base"].points] == ["/versions/1", "/versions/2", "/versions/3"]


def test_the_base_has_its_label_and_no_other_one_runs_into_it() -> None:
    drawing = draw(plot([moved(1, 0)]))
    assert [label for _, label in drawing.x_ticks] == ["@0", "@1 ★", "@2", "@3", "@4"]
    (base, *_) = next(one for one in drawing.drawn if one.series.name == "champions").dots
    assert drawing.x_ticks[0][0] == base.x
    for n in (1, 2, 13, 30, 100, 400):
        many = curve([Contest(number, 0, 6, 4, 0, "HOLD", NOW) for number in range(1, n + 1)])
        ticks = draw(versions_plot(many, history=[], details={}, by="version", champion=0)).x_ticks
        assert ticks[0][1] == "@0 ★"
        assert ticks[-1][1] == f"@{n}"
        assert all(b[0] - a[0] >= 30 for a, b in pairwise(ticks)), n  # as wide as "@100 ★"


def test_the_hover_tells_of_data_beta_kl_and_picks() -> None:
    known = Details(1_204, 0.1, Interval(3.2, 3.0, 3.4, 64), 120, Interval(0.2, 0.18, 0.22, 900))
    series = {one.name: one for one in plot([moved(1, 0)], details={1: known}).series}
    tip = series["promoted, against the base"].points[0].tip
    for part in ("@1, promoted", "against the base: 60 %", "1,204 pairs", "β 0.1", "KL to the base 3.20 nats", "120 picks"):
        assert part in tip
    band = series["share of requests in the duel"].points[0]
    assert (band.lo, band.hi) == (0.0, 0.2)
    assert "stopped before anybody compared it" in series["rejected, against the base"].points[0].tip
    assert series["rejected, against the base"].points[0].lo is None


def test_by_time_the_distances_are_those_of_the_verdicts() -> None:
    drawn = {one.name: one for one in plot([], by="time").series}
    xs = sorted(p.x for name, one in drawn.items() if name.endswith("against the base") for p in one.points)
    assert [b - a for a, b in pairwise(xs)] == [3600, 3600, 6 * 3600]
    assert next(x for x, _ in plot([], by="time").x_labels or ()) == NOW.timestamp()


votes = st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(0, 50), st.sampled_from(VERDICTS))


@settings(max_examples=40)
@given(st.lists(votes, max_size=30), st.sampled_from(["version", "time"]))
def test_every_curve_stays_in_its_box_and_every_interval_holds_its_point(rows: Any, by: Any) -> None:
    made = [
        replace(Contest(number, number - 1, *row), at=NOW + timedelta(minutes=number)) for number, row in enumerate(rows, 1)
    ]
    drawing = draw(versions_plot(curve(made), history=(), details={}, by=by, champion=0))
    for dot in (dot for one in drawing.drawn for dot in one.dots):
        assert drawing.left <= dot.x <= drawing.right
        assert drawing.top <= dot.y <= drawing.bottom
        if dot.y_lo is not None and dot.y_hi is not None:
            assert dot.y_hi <= dot.y <= dot.y_lo


def test_the_last_thing_that_happened_to_a_version_is_its_fate() -> None:
    history = [moved(1, 0), moved(2, 1), moved(1, 2, "rollback"), moved(2, 1)]
    assert moves(history) == {1: Fate.PROMOTED, 2: Fate.PROMOTED}
    assert moves(history[:-1])[2] is Fate.ROLLED_BACK
    assert fate_of(3, {}, verdict="HOLD", state=CycleState.HELD) is Fate.HELD
    assert fate_of(3, {}, verdict="CONTINUE", state=CycleState.DUELLING) is Fate.DUELLING
    assert fate_of(3, {}, verdict=None, state=CycleState.FAILED) is Fate.FAILED
    assert fate_of(3, {}, verdict=None, state=None) is None


def recipe(beta: float, **more: Any) -> dict[str, Any]:
    return {"method": "full", "train": {"beta": beta, "epochs": 1, **more}}


def version(number: int, parent: int, record: dict[str, Any] | None) -> Version:
    at = datetime.now(UTC)
    return Version(POLICY, number, VersionKind.FULL, f"/v/{number}", f"hash-{number}", parent, None, None, at, record=record)


def test_only_settings_that_differ_are_told() -> None:
    old, new = version(1, 0, {"recipe": recipe(0.1)}), version(2, 1, {"recipe": recipe(0.3, seed=7)})
    assert [(d.key, d.was, d.now) for d in differences(old, new) or ()] == [
        ("train.beta", "0.1", "0.3"),
        ("train.seed", "not set", "7"),
    ]
    assert differences(old, replace(old, number=3)) == ()
    assert differences(version(0, 0, None), new) is None


@pytest.fixture
def server(serve: Callable[..., RunningServer]) -> RunningServer:
    return serve()


def trained(server: RunningServer, answer: str, kind: VerdictKind = VerdictKind.HOLD) -> None:
    """Version 1 with everything behind it: dataset, run, cycle with report, duel with one answered prompt, verdict."""
    now = datetime.now(UTC)
    report: dict[str, Any] = {"challenger": 1, "champion": 0, "prompts": 8, "prompts_from": "gate", "samples": 32}
    report |= {
        "metrics": {"kl_base": {"mean": 1.25, "lo": 1.0, "hi": 1.5, "n": 32}},
        "errors": {"entropy": EVIL},
        "notes": [EVIL],
    }
    result = {"steps": 9, "steps_planned": 12, "stopped_because": "ess", "stop_message": f"it ran out {EVIL}"}
    steps = [
        CycleStep(CycleState.BUILDING, {"parent": 0}, now),
        CycleStep(CycleState.TRAINING, {"dataset_id": "dataset_1", "n_train": 412}, now),
        CycleStep(CycleState.CHECKING, {"version": 1, "result": result}, now),
        CycleStep(CycleState.DUELLING, {"duel_id": "duel_1", "report": report}, now),
    ]
    cycle = Cycle("cycle_1", POLICY, 1, 0, EVIL, now, tuple(steps))
    run = Run("run_1", POLICY, "cycle_1", "dataset_1", 0, RunStatus.SUCCEEDED, "me", 1, now, now, {}, result, None, now)
    made = version(1, 0, {"recipe": recipe(0.25)})
    duel = Duel("duel_1", "cycle_1", POLICY, 0, 1, now)
    sides = (Completion(answer, version=1), Completion("plain", version=0))
    group = Group("chatcmpl-1", POLICY, GroupKind.DUEL, Pool.GATE, (Message("user", EVIL),), sides, now, duel_id="duel_1")
    verdict = Verdict(kind, (Reason("evidence", None, f"too few {EVIL}"),), wins=30, losses=10, ties=4, raters=12)

    def write(c: Connection) -> None:
        cycles.insert(c, cycle)
        data = Dataset("dataset_1", POLICY, "/d/1", 412, 40, {}, {"rater_cap": 7}, now)
        datasets.insert(c, data, feedback_seq=0, cycle_id="cycle_1", pairs=[])
        runs.insert(c, run)
        versions.insert(c, replace(made, dataset_id="dataset_1", run_id="run_1"))
        duels.open(c, duel)
        groups.insert(c, group)
        verdicts.insert(c, "cycle_1", "duel_1", verdict, now)

    server.store.write(write)
    server.close_duel(duel, CycleState.HELD, {"reason": EVIL})


def test_a_versions_page_goes_from_the_picks_to_its_service_and_stays_text(server: RunningServer) -> None:
    huge = "\u202eright to left " + EVIL + "x" * 1_000_000
    trained(server, huge)
    server.add_version(2)
    server.http.post(f"/v1/versions/{POLICY}@2/promote", json={"reason": f"by hand {EVIL}"}).raise_for_status()
    text = server.http.get("/versions/1").text
    assert EVIL not in text
    assert "<script>alert" not in text
    assert len(text) < 20_000 + TEXT_SHOWN
    assert f"({len(huge):,} characters)" in text
    for part in (
        "412 rows to train on, 40 held out; 7 set aside",
        "9 of 12 steps",
        "30 won · 10 lost · 4 tied",
        "kl base",
        "1.25",
    ):
        assert part in text
    assert "73 %" in text  # (30 + 4 / 2) / 44, in its duel
    assert "β = 0.25" in text
    assert "Promote" in text
    assert [one for one in ("/v1/exports/", "pairloop versions export") if one in text] == [], "there is nothing to download"
    assert "this policy has no model" in text
    assert "followed by" not in text
    assert "by hand &lt;script&gt;" in server.http.get("/versions/2").text
    listed = server.http.get("/versions").text
    assert EVIL not in listed
    assert "@1, held" in listed
    assert "412 pairs · β 0.25 · KL to the base 1.25 nats" in listed


def test_what_cannot_be_is_an_error_page_that_names_the_parameter(server: RunningServer) -> None:
    for path, status, name in (
        ("/versions?x=colour", 400, "x"),
        ("/versions?before=-1", 400, "before"),
        ("/versions/99", 404, "@99"),
        ("/versions/latest", 400, "number"),
        ("/versions/99999999999", 400, "number"),
    ):
        reply = server.http.get(path)
        assert (reply.status_code, reply.headers["content-type"]) == (status, "text/html; charset=utf-8")
        assert name in reply.text


def test_the_list_is_paged_newest_first(server: RunningServer) -> None:

    def write(c: Connection) -> None:
        for number in range(1, 60):
            versions.insert(c, version(number, 0, None))

    server.store.write(write)
    first = server.http.get("/versions?x=time").text
    assert "60 in all" in first
    assert '<a href="/versions/10">@10</a>' in first
    assert '<a href="/versions/9">@9</a>' not in first
    assert "/versions?x=time&amp;before=10" in first
    second = server.http.get("/versions?x=time&before=10").text
    assert '<a href="/versions/9">@9</a>' in second
    assert '<a href="/versions/10">@10</a>' not in second
    assert "Older" not in second


def test_the_buttons_fit_the_version(server: RunningServer) -> None:
    server.add_version(1)
    assert "Roll back to @" not in server.http.get("/versions/0").text  # the first champion has none before it
    deploy.promote_by_hand(server.store, server.policy, POLICY, number=1, reason="x")
    champion, former = server.http.get("/versions/1").text, server.http.get("/versions/0").text
    assert "Roll back to @0" in champion
    assert 'data-confirm="promote"' not in champion
    assert "Roll back to @0" in former
    assert "It was the champion before @1. Rolling back takes back what came after it" in former
    assert 'data-confirm="promote"' not in former, "a former champion has one way back"
    assert 'data-confirm="canary"' in former
    reply = server.http.post(f"/v1/policies/{POLICY}/rollback", json={"reason": "worse", "to": 0})
    assert reply.status_code == 200, reply.text
    assert "rolled back" in server.http.get("/versions/1").text
    with server.store.reading() as c:
        assert versions.alias(c, POLICY, Alias.CHAMPION) == 0


def test_what_raters_saw_of_version_and_base_stands_beside_the_estimate() -> None:
    seen = Interval(0.8, 0.7, 0.9, 60)
    points = curve([Contest(1, 0, 60, 40, 0, "PROMOTE", NOW, seen), Contest(2, 1, 60, 40, 0, "HOLD", NOW)])
    drawn = {one.name: one for one in versions_plot(points, history=[], details={}, by="version", champion=1).series}
    (met,) = drawn["compared with the base itself"].points
    assert (met.y, met.lo, met.hi) == (0.8, 0.7, 0.9)
    assert "60 votes" in met.tip


def test_a_canary_is_shown_with_the_button_that_stops_it(server: RunningServer) -> None:
    server.add_version(1)
    body = {"reason": "carefully", "canary_share": 0.1}
    server.http.post(f"/v1/versions/{POLICY}@1/promote", json=body).raise_for_status()
    text = server.http.get("/versions/1").text
    assert "canary of 10 %" in text
    assert "Stop the canary" in text
    assert 'data-confirm="canary"' not in text
    server.http.post(f"/v1/policies/{POLICY}/canary/stop", json={"reason": f"enough {EVIL}"}).raise_for_status()
    after = server.http.get("/versions/1").text
    assert "enough &lt;script&gt;" in after
    assert "withdrawn" in after
    assert 'data-confirm="stop-canary"' not in after


def test_a_duel_that_was_ended_by_hand_tells_why_in_place_of_the_gates_first_look(server: RunningServer) -> None:
    trained(server, "an answer", VerdictKind.CONTINUE)
    for path in ("/versions/1", "/versions"):
        text = server.http.get(path).text
        assert EVIL not in text
        assert "&lt;script&gt;" in text  # the reason with which the duel was closed
        assert "too few" not in text
