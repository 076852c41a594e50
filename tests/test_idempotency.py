"""A POST that is sent again under its Idempotency-Key is done once, and answered with the same bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from tests.server import POLICY, RunningServer, chat_body, sse_chunks
from tests.stores import open_store
from tests.waiting import PATIENCE_S, until

from pairloop.policy.fake import FakePolicy
from pairloop.store import feedback, groups, keys, replies
from pairloop.store.keys import Scope
from pairloop.store.replies import StoredReply
from pairloop.web.idempotency import Idempotency

Serve = Callable[..., RunningServer]


def under(key: str, **more: str) -> dict[str, str]:
    return {"idempotency-key": key, **more}


def ask(server: RunningServer, key: str, **body: Any) -> httpx.Response:
    return server.http.post("/v1/chat/completions", json=chat_body(**body), headers=under(key))


def group_count(server: RunningServer) -> int:
    with server.store.reading() as c:
        return groups.count(c, POLICY)


def test_the_same_request_gets_the_same_reply_and_is_done_once(serve: Serve) -> None:
    server = serve()
    first, again = ask(server, "one", n=2), ask(server, "one", n=2)
    assert first.status_code == again.status_code == 200
    assert first.content == again.content
    for header in ("content-type", "x-pairloop-model-version"):
        assert first.headers[header] == again.headers[header]
    assert (first.headers.get("idempotent-replayed"), again.headers["idempotent-replayed"]) == (None, "true")
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    assert group_count(server) == 1
    assert ask(server, "two", n=2).json()["id"] != first.json()["id"]
    assert server.chat(n=2).json()["id"] != server.chat(n=2).json()["id"]  # without a key nothing is kept
    assert group_count(server) == 4


def test_a_deleted_completion_takes_its_kept_reply_with_it(serve: Serve) -> None:
    server = serve()
    first = ask(server, "one", n=2).json()["id"]
    assert server.http.delete(f"/v1/chat/completions/{first}").status_code == 200
    again = ask(server, "one", n=2)
    assert again.json()["id"] != first
    assert "idempotent-replayed" not in again.headers


def test_another_request_under_the_same_key_is_a_conflict(serve: Serve) -> None:
    server = serve()
    group_id = ask(server, "one", n=2).json()["id"]
    other_body = ask(server, "one", n=1)
    other_path = server.http.post("/v1/preferences", json={"inference_id": group_id, "chosen_index": 0}, headers=under("one"))
    for refused in (other_body, other_path):
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (409, "idempotency_key_reused", "Idempotency-Key")
        assert refused.headers["x-should-retry"] == "false"
    assert group_count(server) == 1
    with server.store.reading() as c:
        assert feedback.history(c, group_id) == []


def test_feedback_and_cycles_are_kept_too(serve: Serve) -> None:
    server = serve()
    pick = {"inference_id": server.chat(n=2).json()["id"], "chosen_index": 0}
    replies_ = [server.http.post("/v1/preferences", json=pick, headers=under("pick")) for _ in range(2)]
    assert [reply.status_code for reply in replies_] == [201, 201]
    assert replies_[0].json() == replies_[1].json()
    runs = [server.http.post("/v1/cycles", headers=under("run")) for _ in range(2)]
    assert [reply.status_code for reply in runs] == [202, 202]
    assert "idempotent-replayed" in runs[1].headers


def test_a_second_request_waits_for_the_first(serve: Serve) -> None:
    release = threading.Event()
    server = serve(policy=FakePolicy(release=release))
    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(ask, server, "one", n=2)
        until(lambda: server.policy.queued() > 0)
        others = [clients.submit(ask, server, "one", n=2), clients.submit(ask, server, "one", n=1)]
        assert server.http.get("/health/live").status_code == 200
        assert not any(other.done() for other in others)
        release.set()
        same, conflict = (other.result(20) for other in others)
        assert first.result(20).json() == same.json()
        assert conflict.status_code == 409
    assert group_count(server) == 1


def test_what_was_refused_may_be_tried_again_under_its_key(serve: Serve) -> None:
    server = serve()
    assert ask(server, "one", model="nobody").status_code == 404
    assert ask(server, "one").status_code == 200


def test_a_stream_is_not_kept_and_a_secret_is_not_written_down(serve: Serve) -> None:
    server = serve()
    first, again = (ask(server, "one", stream=True) for _ in range(2))
    assert sse_chunks(first.text)[0]["id"] != sse_chunks(again.text)[0]["id"]
    refused = server.http.post("/v1/keys", json={"name": "x", "scopes": ["train"]}, headers=under("two"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
    with server.store.reading() as c:
        assert not keys.any_(c)


@pytest.mark.parametrize(("key", "status"), [("", 400), ("x" * 255, 200), ("x" * 256, 400)])
def test_the_length_of_a_key(serve: Serve, key: str, status: int) -> None:
    assert ask(serve(), key).status_code == status


def test_a_body_beyond_the_limit_is_refused_under_a_key_too(serve: Serve) -> None:
    server = serve()

    def pieces() -> Iterator[bytes]:
        for _ in range(9):
            yield b" " * 1_000_000

    refused = server.http.post("/v1/feedback", content=pieces(), headers=under("one"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")


def test_one_callers_key_is_not_anothers(serve: Serve) -> None:
    server = serve()
    tokens = []
    for _ in range(2):
        key, token = keys.new("test", [Scope.INFERENCE])
        server.store.write(lambda c, key=key: keys.insert(c, key))  # type: ignore[misc]
        tokens.append(token)
        server.app.state.context.keys.forget(key.key_id)
    ids = [
        server.http.post(
            "/v1/chat/completions", json=chat_body(), headers=under("one", authorization=f"Bearer {token}")
        ).json()["id"]
        for token in (*tokens, *tokens)
    ]
    assert ids[:2] == ids[2:]
    assert ids[0] != ids[1]


def test_replies_are_durable_and_kept_for_a_day(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    reply = StoredReply("hash", 201, {"content-type": "application/json"}, b'{"a": 1}', now)
    with open_store(tmp_path / "artifacts") as store:
        store.write(lambda c: replies.put(c, "key:a", "old", replace(reply, created_at=now - timedelta(hours=23))))
        store.write(lambda c: replies.put(c, "key:a", "new", reply))
        with store.reading() as c:
            assert replies.get(c, "key:a", "new", now=now) == reply
            assert replies.get(c, "key:a", "old", now=now) is not None
            assert replies.get(c, "key:a", "old", now=now + timedelta(hours=1)) is None
            assert replies.get(c, "key:b", "new", now=now) is None
        later = replace(reply, request_hash="other", created_at=now + timedelta(hours=25))
        store.write(lambda c: replies.put(c, "key:a", "new", later))  # its time is over, so that the key is free again
        with store.reading() as c:
            assert replies.get(c, "key:a", "new", now=later.created_at) == later


def test_no_reply_goes_out_that_is_not_stored(tmp_path: Path) -> None:
    """The layer around an application that writes nothing itself, with the store's writer held."""
    writing, go_on = threading.Event(), threading.Event()

    def hold_the_writer(_: object) -> None:
        writing.set()
        go_on.wait(PATIENCE_S)

    def post(app: Any, headers: dict[str, str]) -> int:
        async def send() -> int:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
                return (await client.post("/v1/anything", json={}, headers=headers)).status_code

        return asyncio.run(send())

    with open_store(tmp_path / "artifacts") as store:
        app = Idempotency(JSONResponse({"done": True}), store)
        held = store.submit(hold_the_writer)
        assert writing.wait(PATIENCE_S)
        assert post(app, {}) == 200
        with ThreadPoolExecutor(1) as clients:
            waiting = clients.submit(post, app, under("one"))
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            go_on.set()
            assert waiting.result(PATIENCE_S) == 200
        held.result(PATIENCE_S)
