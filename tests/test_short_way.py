"""The short way in answers what FastAPI's way would have answered; waiting for the writer costs a loop one wake-up."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from tests.server import RunningServer

from pairloop.store.waiting import awaitable

LONG_WAY = "application/json; charset=utf-8"
SHORT_WAY = "application/json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("short-way")) as running:
        yield running


BODIES: dict[str, Any] = {
    "pick": {"chosen_index": 0, "rejected_index": 1, "shown_order": [1, 0], "rater_id": "ann", "tags": {"a": "b"}},
    "with an id": {"chosen_index": 1, "id": "mine", "rater_id": "bob", "edited_text": "better", "reason": "schön"},
    "tie": {"outcome": "tie"},
    "dry": {"outcome": "skip", "dryrun": True},
    "no outcome": {},
    "wrong index": {"chosen_index": 2},
    "unknown field": {"chosen_index": 0, "chosen": 0},
    "unknown group": {"chosen_index": 0, "inference_id": "chatcmpl-nobody"},
    "missing": {"chosen_index": 0, "inference_id": None},
    "text for a number": {"chosen_index": "0"},
    "true for a number": {"chosen_index": True},
    "a float for a number": {"chosen_index": 0.0},
    "a NUL": {"chosen_index": 0, "reason": "a\0b"},
    "half a pair": {"chosen_index": 0, "reason": "\ud800"},
    "too long": {"chosen_index": 0, "id": "x" * 129},
}
RAW = [b"", b"{", b"[]", b"null", b'{"inference_id": NaN}', b"\xff\xfe", b'{"a": ' * 3_000, b'{"chosen_index": 0} x', b" {} "]


def told(reply: httpx.Response) -> tuple[int, Any]:
    body = reply.json()
    if str(body.get("feedback_id", "")).startswith("feedback_"):
        body["feedback_id"] = "new"
    return reply.status_code, body


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/preferences", "/v1/feedback"])
def test_both_ways_answer_the_same(server: RunningServer, name: str, path: str) -> None:
    answers = []
    for way, content_type in enumerate((SHORT_WAY, LONG_WAY)):
        made = server.chat(n=2, user="carl").json()["id"]
        body = {"inference_id": made, **BODIES[name]}
        if path == "/v1/feedback":
            body = {**body, "metric_name": "thumbs", "value": True, "choice_index": body.pop("chosen_index", None)}
            for key in ("rejected_index", "shown_order", "rater_id", "edited_text", "reason", "outcome"):
                body.pop(key, None)
        if "id" in body:  # ids are for good: a pick of its own for each way
            body["id"] += f"-{path[4:]}-{name.replace(' ', '-')}-{way}"
        raw = json.dumps(body).encode()
        for _ in range(2):  # a replay, where there is an id
            status, said = told(server.http.post(path, content=raw, headers={"content-type": content_type}))
            text = json.dumps(said).replace(made, "the group")
            answers.append((status, text.replace(str(body.get("id")), "the id") if "id" in body else text))
    assert answers[:2] == answers[2:]


@pytest.mark.parametrize("raw", RAW)
def test_both_ways_refuse_the_same(server: RunningServer, raw: bytes) -> None:
    short, long = (
        server.http.post("/v1/preferences", content=raw, headers={"content-type": content_type})
        for content_type in (SHORT_WAY, LONG_WAY)
    )
    assert short.status_code == 400
    assert (short.status_code, short.json()) == (long.status_code, long.json())


def test_a_short_request_counts_under_its_route(server: RunningServer) -> None:
    made = server.chat(n=2).json()["id"]
    assert server.http.post("/v1/preferences", json={"inference_id": made, "chosen_index": 0}).status_code == 201
    text = server.http.get("/metrics").text
    assert 'pairloop_requests_total{method="POST",route="/v1/preferences",status="201"}' in text
    assert 'pairloop_request_seconds_count{route="/v1/preferences"}' in text


def test_a_body_in_many_pieces_is_read_to_its_end(server: RunningServer) -> None:
    made = server.chat(n=2).json()["id"]
    whole = json.dumps({"inference_id": made, "chosen_index": 0, "reason": "x" * 200}).encode()
    for content, status in ((whole, 201), (whole[:-1] + b", }", 400)):
        pieces = (content[start : start + 50] for start in range(0, len(content), 50))
        reply = server.http.post("/v1/preferences", content=pieces, headers={"content-type": SHORT_WAY})
        assert reply.status_code == status


def test_a_future_is_waited_for_in_a_loop() -> None:
    async def run() -> None:
        futures: list[Future[int]] = [Future() for _ in range(200)]
        waiting = [awaitable(future) for future in futures]

        def end() -> None:
            for number, future in enumerate(futures):
                if future.set_running_or_notify_cancel():
                    if number % 2:
                        future.set_exception(ValueError(str(number)))
                    else:
                        future.set_result(number)

        waiting[10].cancel()
        await asyncio.sleep(0)  # a cancelled wait takes its function out of the queue
        assert futures[10].cancelled()
        threading.Thread(target=end).start()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        for number, one in enumerate(found):
            if number == 10:
                assert isinstance(one, asyncio.CancelledError)
            elif number % 2:
                assert str(one) == str(number)
            else:
                assert one == number

    asyncio.run(run())


def test_a_loop_that_is_gone_is_not_woken() -> None:
    future: Future[int] = Future()

    async def leave() -> None:
        awaitable(future)

    asyncio.run(leave())
    if future.set_running_or_notify_cancel():
        future.set_result(1)
