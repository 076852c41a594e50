"""`pairloop.client` against a real server: resources by page, feedback, cycles and jobs followed, errors, attempts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx
import pytest
from tests.server import POLICY, RunningServer, fake_config, user_of

from pairloop.client import (
    AccessDenied,
    BadRequest,
    Client,
    Conflict,
    NotFound,
    RateLimited,
    ServerError,
    Unreachable,
)
from pairloop.store import cycles, feedback, triggers
from pairloop.types import Cycle, CycleState, CycleStep, Pool

Serve = Callable[..., RunningServer]


@pytest.fixture
def server(serve: Serve) -> RunningServer:
    return serve()


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with connect(server) as client:
        yield client


def connect(server: RunningServer, **options: Any) -> Client:
    return Client(server.url, http=httpx.Client(trust_env=False), **{"poll_s": 0.0, **options})


def test_resources_are_got_and_all_pages_are_read(server: RunningServer, client: Client) -> None:
    for number in range(1, 4):
        server.add_version(number)
    server.open_duel(3)
    assert [policy.id for policy in client.policies] == [POLICY]
    assert client.policies.get(POLICY).versions == 4
    first = client.versions.page(limit=2)
    rest = client.versions.page(limit=2, after=first.last_id)
    assert [version.number for version in (*first.data, *rest.data)] == [0, 1, 2, 3]
    assert (first.has_more, rest.has_more) == (True, False)
    assert [duel.challenger for duel in client.duels] == [f"{POLICY}@3"]
    assert client.cycles.get("cycle_3").state == "duelling"
    assert not list(client.gates)
    assert not list(client.datasets)
    schedule = client.schedules.get(POLICY)
    assert (schedule.enabled, schedule.pending, schedule.min_pairs) == (True, None, 500)
    assert client.status()["cycle"]["state"] == "duelling"


def test_picks_values_raters_and_moves(server: RunningServer, client: Client) -> None:
    group_id = server.chat(n=2, user=user_of(Pool.TRAIN)).json()["id"]
    receipt = client.prefer(group_id, 1, rater_id="user-7", latency_ms=4_000)
    assert (receipt.duplicate, receipt.versions) == (False, [f"{POLICY}@0"] * 2)
    client.prefer(group_id, outcome="tie", rater_id="user-8")
    client.value(group_id, "thumbs", True, choice_index=0, source_id="user-9")
    assert [(rater.id, rater.feedback) for rater in client.raters] == [("user-7", 1), ("user-8", 1), ("user-9", 1)]
    assert client.raters.page(after="user-7", limit=1).data == [client.raters.get("user-8")]
    server.add_version(1)
    assert client.promote(f"{POLICY}@1", reason="better").champion == f"{POLICY}@1"
    assert client.rollback(POLICY).champion == f"{POLICY}@0"
    with server.store.reading() as c:
        assert len(feedback.history(c, group_id)) == 3


def test_a_cycle_is_followed_from_its_trigger_to_its_end(server: RunningServer, client: Client) -> None:
    """Each look finds one more step, until the end; the scheduler's part is played here."""
    states = [CycleState.BUILDING, CycleState.TRAINING, CycleState.CHECKING, CycleState.REJECTED]

    def go_on(_: float) -> None:
        now = datetime.now(UTC)
        with server.store.reading() as c:
            open_ = cycles.get(c, "cycle_9")
        if open_ is None:
            assert server.store.write(lambda c: triggers.take(c, POLICY)) == "now"
            begun = Cycle("cycle_9", POLICY, 9, 0, "now", now, (CycleStep(states[0], {}, now),))
            server.store.write(lambda c: cycles.insert(c, begun))
        else:
            step = CycleStep(states[len(open_.steps)], {"step": len(open_.steps)}, now)
            server.store.write(lambda c: cycles.step(c, "cycle_9", step))

    with connect(server, sleep=go_on) as watching:
        assert [step.state for step in watching.run_cycle(reason="now")] == [str(state) for state in states]
    assert [step.state for step in client.follow_cycle("cycle_9")] == [str(state) for state in states]


def test_the_events_of_a_job_come_in_order_until_it_has_ended(server: RunningServer) -> None:
    turn = {"messages": [{"role": "user", "content": "Hello"}]}
    pairs = [
        {
            "input": turn,
            "preferred_output": [{"role": "assistant", "content": f"good {number}"}],
            "non_preferred_output": [{"role": "assistant", "content": f"bad {number}"}],
        }
        for number in range(8)
    ]
    content = "\n".join(map(json.dumps, pairs)).encode()
    file = server.openai.files.create(file=("pairs.jsonl", content), purpose="fine-tune")
    dpo: Any = {"type": "dpo", "dpo": {}}
    job = server.openai.fine_tuning.jobs.create(training_file=file.id, model=POLICY, method=dpo)
    looked: list[float] = []

    def cancel(pause_s: float) -> None:
        looked.append(pause_s)
        server.openai.fine_tuning.jobs.cancel(job.id)

    with connect(server, sleep=cancel) as client:
        events = list(client.follow_job(job.id))
    assert len(looked) == 1
    newest_first = server.openai.fine_tuning.jobs.list_events(job.id).data
    assert [event["id"] for event in events] == [event.id for event in reversed(newest_first)]
    assert len(events) >= 2
    assert "cancel" in events[-1]["message"].lower()


def test_errors_are_typed_and_carry_the_requests_id(server: RunningServer, client: Client) -> None:
    with pytest.raises(NotFound, match="no cycle 'nobody'") as missing:
        client.cycles.get("nobody")
    assert (missing.value.status, missing.value.param) == (404, "cycle_id")
    assert missing.value.request_id is not None
    assert missing.value.request_id in str(missing.value)
    with pytest.raises(Conflict):
        client.rollback(POLICY)
    with pytest.raises(BadRequest) as bad:
        client.prefer("chatcmpl-x", 0, rater_id="")
    assert bad.value.param == "rater_id"
    with pytest.raises(NotFound):
        client.versions.get("../../health")
    server.http.post("/v1/keys", json={"name": "x", "scopes": ["admin"]})
    with pytest.raises(AccessDenied):
        client.status()


class Flaky(ThreadingHTTPServer):
    """Answers the first requests with these, then as asked; notes the headers that it was sent. Status 0 hangs up."""

    def __init__(self, first: list[tuple[int, dict[str, str]]]) -> None:
        super().__init__(("127.0.0.1", 0), _FlakyHandler)
        self.first = first
        self.seen: list[Mapping[str, str | None]] = []
        self.waits: list[float] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def prefer(self) -> str:
        http = httpx.Client(trust_env=False)
        with Client(f"http://127.0.0.1:{self.server_port}/v1", http=http, sleep=self.waits.append) as client:
            return client.prefer("i", 0).feedback_id


class _FlakyHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Flaky)
        server.seen.append({name: self.headers.get(name) for name in ("idempotency-key", "x-stainless-retry-count")})
        self.rfile.read(int(self.headers["content-length"]))
        status, headers = server.first.pop(0) if server.first else (201, {})
        if not status:
            return
        body: dict[str, Any] = {"feedback_id": "f", "inference_id": "i", "duplicate": False, "revision": 0}
        if status != 201:
            body = {"error": {"message": "no", "type": "x", "param": None, "code": "c"}}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None: ...


def test_what_may_help_is_tried_again_with_one_idempotency_key() -> None:
    with Flaky([(503, {"retry-after": "1"}), (429, {"retry-after": "7"}), (0, {}), (408, {})]) as server:
        assert server.prefer() == "f"
        assert server.waits[:2] == [1.0, 7.0]
        assert 1.5 <= server.waits[2] <= 2.0
        assert 3.0 <= server.waits[3] <= 4.0
        assert [headers["x-stainless-retry-count"] for headers in server.seen] == [None, "1", "2", "3", "4"]
        server.prefer()
        keys = [headers["idempotency-key"] for headers in server.seen]
        assert len(set(keys[:5])) == 1
        assert None not in keys
        assert keys[5] != keys[0]


@pytest.mark.parametrize(
    ("first", "raised"),
    [
        ([(429, {})] * 9, RateLimited),
        ([(503, {})] * 9, ServerError),
        ([(0, {})] * 9, Unreachable),
        ([(500, {})], ServerError),
        ([(503, {"x-should-retry": "false"})], ServerError),
        ([(409, {})], Conflict),
    ],
)
def test_in_the_end_it_gives_up(first: list[tuple[int, dict[str, str]]], raised: type[Exception]) -> None:
    with Flaky(list(first)) as server:
        with pytest.raises(raised):
            server.prefer()
        assert len(server.seen) == (5 if len(first) > 1 else 1)


def test_a_limited_client_waits_as_long_as_the_server_says(serve: Serve, tmp_path: Any) -> None:
    server = serve(config=fake_config(tmp_path / "state", serve={"requests_per_minute": 1}))
    waits: list[float] = []
    with connect(server, sleep=waits.append, retries=1) as client:
        client.status()
        with pytest.raises(RateLimited):
            client.status()
    assert len(waits) == 1
    assert 50 <= waits[0] <= 60
