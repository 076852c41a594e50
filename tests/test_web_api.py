"""Feedback and our own resources over HTTP, the operator's moves, health and metrics, and the serving process itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, event
from tests.server import POLICY, RunningServer, sse_chunks, user_of
from tests.waiting import PATIENCE_S, until

from pairloop.config import parse_config
from pairloop.errors import ConfigError
from pairloop.loop import cycle
from pairloop.store import datasets, feedback, triggers, verdicts, versions
from pairloop.types import Alias, CycleState, Dataset, Pool, Reason, Verdict, VerdictKind
from pairloop.web.server import listen, run

Serve = Callable[..., RunningServer]


@pytest.fixture
def server(serve: Serve) -> RunningServer:
    return serve()


def asked(server: RunningServer, **body: Any) -> str:
    return str(server.chat(n=2, user=user_of(Pool.TRAIN), **body).json()["id"])


# --- feedback


def test_picks_replays_conflicts_and_unknown_groups(server: RunningServer) -> None:
    group_id = asked(server)
    body = {"id": "pick-1", "inference_id": group_id, "outcome": "chosen", "chosen_index": 1, "rejected_index": 0}
    body |= {
        "shown_order": [1, 0],
        "reason": "clear",
        "rater_id": "user-7",
        "latency_ms": 5400,
        "source": "human",
        "tags": {"a": "b"},
    }
    first, again = (server.http.post("/v1/preferences", json=body) for _ in range(2))
    assert (first.status_code, first.json()["duplicate"]) == (201, False)
    assert (again.status_code, again.json()["duplicate"]) == (200, True)
    assert first.json()["feedback_id"] == again.json()["feedback_id"] == "pick-1"
    other = server.http.post("/v1/preferences", json={**body, "chosen_index": 0, "rejected_index": 1})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    unknown = server.http.post("/v1/preferences", json={"inference_id": "chatcmpl-nobody", "chosen_index": 0})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "inference_id")
    with server.store.reading() as c:
        assert len(feedback.history(c, group_id)) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chosen_index": 7}, "chosen_index"),
        ({"chosen_index": "1"}, "chosen_index"),
        ({"outcome": "error"}, "outcome"),
        ({"outcome": None}, "outcome"),
        ({"chosen_index": 0, "latency_ms": -1}, "latency_ms"),
        ({"chosen_index": 0, "shown_order": [0, 1, 2]}, "shown_order"),
        ({"chosen_index": 0, "source": "alien"}, "source"),
        ({"chosen_index": 0, "id": "no spaces"}, "id"),
        ({"chosen_index": 0, "rater_id": ""}, "rater_id"),
        ({"chosen_index": 0, "tags": {"k": 1}}, "tags.k"),
        ({"chosen_index": 0, "winner": 0}, "winner"),
        ({"chosen_index": 0, "inference_id": None}, "inference_id"),
    ],
)
def test_picks_that_cannot_be_right_name_their_field(server: RunningServer, fields: Mapping[str, Any], param: str) -> None:
    response = server.http.post("/v1/preferences", json={"inference_id": asked(server), **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_values_thumbs_scores_and_demonstrations(server: RunningServer) -> None:
    group_id = asked(server)
    for metric, value in (("thumbs", True), ("score", 0.5), ("comment", "nice"), ("demonstration", "ideal"), ("csat", 4)):
        body = {"inference_id": group_id, "choice_index": 0, "metric_name": metric, "value": value, "source_id": "rita"}
        assert server.http.post("/v1/feedback", json=body).status_code == 201
    with server.store.reading() as c:
        said = {row.metric: row.value for row in feedback.for_group(c, group_id)}
    assert said == {"thumbs": True, "score": 0.5, "comment": "nice", "demonstration": "ideal", "csat": 4}
    assert said["thumbs"] is True
    for fields, param in (
        ({"metric_name": "thumbs", "value": 1}, "value"),
        ({"metric_name": "thumbs", "value": None}, "value"),
        ({"metric_name": "thumbs", "value": True, "choice_index": 7}, "choice_index"),
        ({"metric_name": "a b", "value": True}, "metric_name"),
    ):
        response = server.http.post("/v1/feedback", json={"inference_id": group_id, "choice_index": 0, **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_a_dry_run_writes_nothing(server: RunningServer) -> None:
    group_id = asked(server)
    for path, fields in (
        ("/v1/preferences", {"chosen_index": 0}),
        ("/v1/feedback", {"metric_name": "thumbs", "value": True, "choice_index": 0}),
    ):
        response = server.http.post(path, json={"inference_id": group_id, "dryrun": True, **fields})
        assert (response.status_code, response.json()["dryrun"]) == (200, True)
        assert "versions" not in response.json()
    with server.store.reading() as c:
        assert feedback.history(c, group_id) == []


def test_a_pick_is_durable_before_its_201(server: RunningServer) -> None:
    group_id = asked(server)
    writing, go_on = threading.Event(), threading.Event()

    def hold_the_writer(_: Connection) -> None:
        writing.set()
        go_on.wait(PATIENCE_S)

    held = server.store.submit(hold_the_writer)
    assert writing.wait(PATIENCE_S)
    with ThreadPoolExecutor(1) as clients:
        picking = clients.submit(server.http.post, "/v1/preferences", json={"inference_id": group_id, "chosen_index": 0})
        assert server.http.get("/health/live").status_code == 200
        assert not picking.done()
        go_on.set()
        held.result(PATIENCE_S)
        assert picking.result(PATIENCE_S).status_code == 201
    with server.store.reading() as c:
        assert len(feedback.history(c, group_id)) == 1


# --- resources


def judged_cycle(server: RunningServer, number: int, kind: VerdictKind, state: CycleState, *, wins: int, losses: int) -> None:
    """A version, its duel, its verdict, and its end."""
    server.add_version(number)
    duel = server.open_duel(number)
    reason = Reason("evidence", kind is VerdictKind.PROMOTE, f"{wins} of {wins + losses} picks <for> the challenger", 3.0, 20.0)
    verdict = Verdict(kind, (reason,), e_value=3.0, wins=wins, losses=losses, ties=1, raters=9)
    server.store.write(lambda c: verdicts.insert(c, duel.cycle_id, duel.duel_id, verdict, datetime.now(UTC)))
    server.close_duel(duel, state, {"reason": verdict.text})
    if kind is VerdictKind.PROMOTE:
        server.alias(Alias.CHAMPION, number)


def test_resources_are_listed_and_got(server: RunningServer) -> None:
    judged_cycle(server, 1, VerdictKind.PROMOTE, CycleState.PROMOTED, wins=40, losses=20)
    judged_cycle(server, 2, VerdictKind.HOLD, CycleState.HELD, wins=30, losses=28)
    dataset = Dataset("dataset_1", POLICY, "x", 8, 2, {"picks": 10}, {"tie": 3}, datetime.now(UTC))
    server.store.write(lambda c: datasets.insert(c, dataset, feedback_seq=0, cycle_id="cycle_1", pairs=()))
    expected = {
        "policies": [POLICY],
        "versions": [f"{POLICY}@0", f"{POLICY}@1", f"{POLICY}@2"],
        "cycles": ["cycle_2", "cycle_1"],
        "datasets": ["dataset_1"],
        "duels": ["duel_2", "duel_1"],
        "gates": ["cycle_2", "cycle_1"],
    }
    for resource, ids in expected.items():
        listed = server.http.get(f"/v1/{resource}").json()
        assert [item["id"] for item in listed["data"]] == ids
        assert (listed["object"], listed["has_more"]) == ("list", False)
        for item in listed["data"]:
            assert server.http.get(f"/v1/{resource}/{item['id']}").json() == item
        missing = server.http.get(f"/v1/{resource}/nobody")
        assert missing.status_code == 404
        assert set(missing.json()["error"]) == {"message", "type", "param", "code"}
    gate = server.http.get("/v1/gates/cycle_1").json()["verdict"]
    assert (gate["kind"], gate["wins"], gate["losses"], gate["ties"]) == ("PROMOTE", 40, 20, 1)
    assert gate["ci95"][0] < gate["win_rate"] < gate["ci95"][1]
    assert server.http.get("/v1/policies").json()["data"][0]["champion"] == f"{POLICY}@1"
    assert server.http.get(f"/v1/versions/{POLICY}@1").json()["aliases"] == ["champion"]


def test_lists_are_paged_by_cursor(server: RunningServer) -> None:
    for number in range(1, 6):
        server.add_version(number)
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = server.http.get("/v1/versions", params=query).json()
        seen += [item["id"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert seen == [f"{POLICY}@{number}" for number in range(6)]
    for params, status in (({"limit": 0}, 400), ({"limit": 101}, 400), ({"limit": "many"}, 400), ({"after": "nobody"}, 404)):
        assert server.http.get("/v1/versions", params=params).status_code == status


def test_a_page_reads_no_more_than_it_shows(server: RunningServer) -> None:
    for number in range(1, 6):
        judged_cycle(server, number, VerdictKind.HOLD, CycleState.HELD, wins=3, losses=2)
        made = Dataset(f"dataset_{number}", POLICY, "x", 8, 2, {}, {}, datetime.now(UTC))
        server.store.write(lambda c, made=made: datasets.insert(c, made, feedback_seq=0, cycle_id=None, pairs=()))  # type: ignore[misc]
        server.http.post(
            "/v1/preferences", json={"inference_id": asked(server), "chosen_index": 0, "rater_id": f"rater-{number}"}
        )
    for resource, of in (("cycles", 5), ("datasets", 5), ("duels", 5), ("gates", 5), ("raters", 5), ("versions", 6)):
        ids: list[str] = []
        while len(ids) < of:
            page = server.http.get(f"/v1/{resource}", params={"limit": 2, **({"after": ids[-1]} if ids else {})}).json()
            assert page["has_more"] == (len(ids) + 2 < of)
            ids += [item["id"] for item in page["data"]]
        assert len(set(ids)) == len(ids) == of
        missing = server.http.get(f"/v1/{resource}", params={"after": "nobody"})
        assert (missing.status_code, missing.json()["error"]["param"]) == (404, "after"), resource
        said: list[str] = []
        event.listen(server.store._reading, "before_cursor_execute", lambda _c, _k, sql, *_r, said=said: said.append(sql))
        server.http.get(f"/v1/{resource}", params={"limit": 2})
        assert any("LIMIT" in sql for sql in said), resource
        assert len(said) <= 12, resource


class NotedScheduler:
    """Counts what the server tells it; turns no loop."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def notify(self) -> None:
        self.calls.append("notify")

    def status(self) -> Mapping[str, Any]:
        return {"running": True}


def test_the_scheduler_is_started_told_and_stopped(tmp_path: Path) -> None:
    scheduler = NotedScheduler()
    with RunningServer(tmp_path / "server", scheduler=scheduler) as server:
        group_id = asked(server)
        assert scheduler.calls == ["start"]
        body = {"id": "one", "inference_id": group_id, "chosen_index": 0}
        for _ in range(2):
            server.http.post("/v1/preferences", json=body)
        assert scheduler.calls == ["start", "notify"]
        triggered = server.http.post("/v1/cycles", json={"reason": "let us see"})
        assert (triggered.status_code, triggered.json()["reason"]) == (202, "let us see")
        assert scheduler.calls == ["start", "notify", "notify"]
        with server.store.reading() as c:
            assert triggers.peek(c, POLICY) == "let us see"
        assert server.http.post("/v1/cycles").json()["running"] is None
        assert server.http.post("/v1/cycles", json={"policy": "other"}).status_code == 404
        assert server.http.get("/v1/status").json()["scheduler"] == {"running": True, "enabled": True}
    assert scheduler.calls[-1] == "stop"


def test_promote_and_rollback(server: RunningServer) -> None:
    server.add_version(1)
    promoted = server.http.post(f"/v1/versions/{POLICY}@1/promote", json={"reason": "it is better"})
    assert promoted.status_code == 200, promoted.text
    assert (promoted.json()["champion"], promoted.json()["previous"]) == (f"{POLICY}@1", f"{POLICY}@0")
    assert server.chat().json()["model"] == f"{POLICY}@1"
    assert server.http.post(f"/v1/versions/{POLICY}@1/promote").status_code == 409
    assert server.http.post(f"/v1/versions/{POLICY}@7/promote").status_code == 404
    back = server.http.post(f"/v1/policies/{POLICY}/rollback")
    assert (back.status_code, back.json()["champion"]) == (200, f"{POLICY}@0")
    assert server.chat().json()["model"] == f"{POLICY}@0"
    assert server.http.post(f"/v1/policies/{POLICY}/rollback").status_code == 409
    assert server.http.post("/v1/policies/other/rollback").status_code == 404
    with server.store.reading() as c:
        assert versions.promotions(c, POLICY)[0].reason == "it is better"


def test_the_status_follows_a_duel(server: RunningServer) -> None:
    idle = server.http.get("/v1/status").json()
    assert (idle["cycle"], idle["duel"], idle["last_verdict"], idle["curve"]) == (None, None, None, [])
    judged_cycle(server, 1, VerdictKind.PROMOTE, CycleState.PROMOTED, wins=40, losses=20)
    server.add_version(2)
    server.open_duel(2)
    for number in range(6):
        judge = user_of(Pool.GATE, number)
        group_id = server.chat(n=2, user=judge).json()["id"]
        answers = server.group(group_id).completions
        better = next(index for index, completion in enumerate(answers) if completion.version == 2)
        pick = {"inference_id": group_id, "chosen_index": better, "rater_id": judge, "latency_ms": 4_000}
        assert server.http.post("/v1/preferences", json=pick).status_code == 201

    def with_all_picks() -> Any:  # the board is read again after half a second
        found = server.http.get("/v1/status").json()
        return found if found["duel"] is not None and found["duel"]["picks"] == 6 else None

    status = until(with_all_picks)
    duel = status["duel"]
    assert (duel["picks"], duel["champion"], duel["challenger"]) == (6, 1, 2)
    assert duel["wins"] + duel["losses"] + duel["ties"] == 6
    assert duel["losses"] == 0
    assert status["cycle"]["state"] == "duelling"
    assert status["last_verdict"]["kind"] == "PROMOTE"
    same = cycle.status(server.store, server.config)
    assert same.duel is not None
    assert same.duel.win_rate.mean == duel["win_rate"]
    assert same.progress is not None
    assert status["progress"] == same.progress._asdict() == {"done": 6, "of": 6 + duel["picks_to_go"]}
    assert same.last_verdict is not None
    assert (status["last_verdict"]["cycle"], status["last_verdict"]["version"]) == (1, 1)
    assert (same.last_verdict.cycle, same.last_verdict.version) == (1, 1)
    assert (status["challenger"], same.challenger) == (f"{POLICY}@2", 2)
    first, second = status["curve"]
    assert (first["version"], first["verdict"]) == (1, "PROMOTE")
    assert (second["version"], second["verdict"]) == (2, None)


# --- operation


def test_health_version_and_metrics(server: RunningServer) -> None:
    assert server.http.get("/health").json() == {"status": "ok", "policy": POLICY, "champion": 0}
    assert server.http.get("/health/live").json() == {"status": "ok"}
    assert server.http.get("/health/ready").json() == {"status": "ready"}
    assert set(server.http.get("/version").json()) == {"version"}
    group_id = asked(server)
    server.http.post("/v1/preferences", json={"inference_id": group_id, "chosen_index": 0})
    sse_chunks(server.chat(stream=True, user=user_of(Pool.TRAIN)).text)
    server.chat(n=0)
    metrics = server.http.get("/metrics").text
    for line in (
        'pairloop_requests_total{method="POST",route="/v1/chat/completions",status="200"} 2.0',
        'pairloop_requests_total{method="POST",route="/v1/chat/completions",status="400"} 1.0',
        'pairloop_groups_total{kind="train",pool="train"} 2.0',
        'pairloop_picks_total{label="A"} 1.0',
        "pairloop_champion_version 0.0",
        "pairloop_queue 0.0",
        'pairloop_cycle_state{state="training"} 0.0',
    ):
        assert line in metrics
    assert 'pairloop_tokens_total{part="completion"}' in metrics
    assert "pairloop_request_seconds_bucket" in metrics


def test_all_errors_have_one_shape_and_every_reply_an_id(server: RunningServer) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/static/nowhere.js", 404),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/feedback", 400),
        ("GET", "/v1/cycles/nobody", 404),
    ):
        response = server.http.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["x-request-id"].startswith("req_")
        assert "openai-processing-ms" in response.headers


class BrokenScheduler(NotedScheduler):
    def notify(self) -> None:
        raise RuntimeError("a bug")


def test_a_bug_is_a_500_in_the_same_shape_and_is_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(scheduler=BrokenScheduler())
    response = server.http.post("/v1/cycles")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "a bug" not in response.text
    logged = {record.__dict__.get("fields", {}).get("request_id") for record in caplog.records if record.levelname == "ERROR"}
    assert logged == {response.headers["x-request-id"]}
    assert server.http.get("/health").status_code == 200


def test_other_sites_cannot_drive_the_server(server: RunningServer) -> None:
    refused = server.http.post("/v1/cycles", headers={"origin": "https://evil.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "cross_site")
    assert server.http.post("/v1/cycles", headers={"origin": server.url}).status_code == 202
    with server.store.reading() as c:
        assert triggers.peek(c, POLICY) is not None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "192.168.1.1:{port}",
        "0.0.0.0",
        "127.0.0.1:80@evil.example",
        "[2001:db8::1]:{port}",
        "127.0.0.1:x",
        "[::1].evil.example",
    ],
)
def test_a_name_that_was_rebound_to_loopback_is_refused(server: RunningServer, host: str) -> None:
    """Its page is of the same origin as what it asks for, so that only the Host header tells."""
    named = host.format(port=httpx.URL(server.url).port)
    headers = {"host": named, "origin": f"http://{named}"}
    for method, path in (
        ("GET", "/"),
        ("GET", "/health"),
        ("GET", "/health/live"),
        ("GET", "/metrics"),
        ("POST", "/v1/cycles"),
    ):
        refused = server.http.request(method, path, headers=headers)
        assert refused.status_code == 421, (host, path)
        error = refused.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", "wrong_host")
        assert refused.headers["x-request-id"].startswith("req_")
    with server.store.reading() as c:
        assert triggers.peek(c, POLICY) is None


def test_every_name_of_loopback_is_answered(server: RunningServer) -> None:
    for host in ("127.0.0.1", "127.8.8.8:9000", "localhost", "LocalHost:80", "[::1]", "[::1]:8000"):
        assert server.http.get("/v1/status", headers={"host": host}).status_code == 200, host
        assert server.http.post("/v1/cycles", headers={"host": host, "origin": f"http://{host}"}).status_code == 202, host


def test_a_request_without_a_host_is_refused(server: RunningServer) -> None:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=10) as client:
        client.sendall(b"GET /v1/status HTTP/1.0\r\n\r\n")
        assert b" 421 " in client.recv(4096)


def test_openapi_describes_every_route(server: RunningServer) -> None:
    schema = server.http.get("/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/preferences", "/v1/cycles", "/v1/versions/{version_id}/promote", "/metrics"):
        assert path in schema["paths"]
    for methods in schema["paths"].values():
        for route in methods.values():
            assert route["summary"]
            assert route["tags"]


# --- the process


def test_only_addresses_are_listened_on_and_a_taken_port_is_named() -> None:
    with pytest.raises(ConfigError, match=r"serve\.host"):
        listen("example.com", 0)
    with closing(listen("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            listen("127.0.0.1", port)


def test_a_taken_port_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        serve = {"port": taken.getsockname()[1]}
        config = parse_config({"state_dir": tmp_path / "state", "policy": {"model": "fake"}, "serve": serve})
        with pytest.raises(ConfigError, match="is in use"):
            run(config)
    assert not (tmp_path / "state").exists()


SERVE = """
from pathlib import Path
import sys
from pairloop.config import parse_config
from pairloop.web.server import run
run(parse_config({"state_dir": Path(sys.argv[1]), "policy": {"model": "fake", "method": "full"}, "serve": {"port": 0}}))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_process_says_where_it_listens_and_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", SERVE, str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode().strip()
            assert line.startswith("pairloop is listening on http://127.0.0.1:")
            url = line.rsplit(" ", 1)[1]
            with httpx.Client(base_url=url, timeout=20.0, trust_env=False) as http:
                body = {"model": POLICY, "n": 2, "messages": [{"role": "user", "content": "hello"}]}
                group_id = http.post("/v1/chat/completions", json=body).json()["id"]
                assert http.post("/v1/preferences", json={"inference_id": group_id, "chosen_index": 0}).status_code == 201
            process.send_signal(number)
            assert process.wait(20) == 0
            assert process.stdout.read() == b""
        finally:
            process.kill()
