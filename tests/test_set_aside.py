"""Nothing that was said is lost from sight: revisions of a feedback, and the reason of each row that a dataset did not use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.server import POLICY, RunningServer, user_of

from pairloop.loop.pairs import run as compile_dataset
from pairloop.types import Pool

Serve = Callable[..., RunningServer]


@pytest.fixture
def server(serve: Serve) -> RunningServer:
    return serve()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that change nothing which another would see."""
    with RunningServer(tmp_path_factory.mktemp("shared") / "server") as server:
        yield server


def said(server: RunningServer, inference_id: str, **body: Any) -> str:
    path = "/v1/preferences" if "metric_name" not in body else "/v1/feedback"
    reply = server.http.post(path, json={"inference_id": inference_id, **body})
    assert reply.status_code == 201, reply.text
    feedback_id: str = reply.json()["feedback_id"]
    return feedback_id


def test_all_that_was_said_is_shown_with_what_counts(server: RunningServer) -> None:
    reply = server.chat(n=2, user=user_of(Pool.TRAIN)).json()["id"]
    first = said(server, reply, chosen_index=0, rater_id="rita", reason="kind", tags={"a": "b"}, shown_order=[1, 0])
    second = said(server, reply, chosen_index=1, rater_id="rita")
    thumb = said(server, reply, metric_name="thumbs", value=True, choice_index=0, source_id="olaf")
    listed = server.http.get("/v1/feedback", params={"inference_id": reply}).json()
    assert [(row["id"], row["revision"], row["counts"]) for row in listed["data"]] == [
        (first, 0, False),
        (second, 1, True),
        (thumb, 0, True),
    ]
    assert listed["data"][0] | {"created_at": 0} == {
        "object": "feedback",
        "id": first,
        "inference_id": reply,
        "metric_name": "preference",
        "label": "A",
        "choice_index": None,
        "value": None,
        "text": "kind",
        "shown_order": [1, 0],
        "rater_id": "rita",
        "source": "human",
        "latency_ms": None,
        "tags": {"a": "b"},
        "revision": 0,
        "counts": False,
        "created_at": 0,
    }
    page = server.http.get("/v1/feedback", params={"inference_id": reply, "limit": 1, "after": first}).json()
    assert ([row["id"] for row in page["data"]], page["has_more"]) == ([second], True)


def test_in_a_duel_the_first_word_counts_and_no_version_is_named(server: RunningServer) -> None:
    server.add_version(1)
    server.open_duel(1)
    reply = server.chat(n=2, user=user_of(Pool.GATE)).json()["id"]
    said(server, reply, outcome="skip")
    blind = server.http.get("/v1/feedback", params={"inference_id": reply})
    assert "@" not in blind.text
    said(server, reply, chosen_index=1)
    said(server, reply, chosen_index=0, rater_id="olaf")
    said(server, reply, metric_name="thumbs", value=True, choice_index=0)
    rows = server.http.get("/v1/feedback", params={"inference_id": reply}).json()["data"]
    assert [row["counts"] for row in rows] == [True, False, False, True]


def test_each_row_that_a_dataset_did_not_use_has_its_reason(server: RunningServer) -> None:
    reasons = {}
    for number in range(5):
        reply = server.chat(
            n=2, user=user_of(Pool.TRAIN, number), messages=[{"role": "user", "content": f"order {number}?"}]
        ).json()
        texts = [choice["message"]["content"] for choice in reply["choices"]]
        if number == 0:
            while texts[0] == texts[1]:
                reply = server.chat(n=2, user=user_of(Pool.TRAIN)).json()
                texts = [choice["message"]["content"] for choice in reply["choices"]]
            said(server, reply["id"], chosen_index=0)
        elif number < 3:
            reasons[said(server, reply["id"], outcome="tie" if number == 1 else "both_bad")] = ("tie", "both_bad")[number - 1]
        elif number == 3:
            reasons[said(server, reply["id"], outcome="error", source="llm")] = "judge_error"
        else:
            reasons[said(server, reply["id"], metric_name="csat", value=4, choice_index=0)] = "other_metric"
    dataset = compile_dataset(server.store, server.policy.tokens, server.config, cycle_id=None, parent=0)
    assert dataset is not None
    path = f"/v1/datasets/{dataset.dataset_id}/set_aside"
    listed = server.http.get(path).json()
    assert {row["id"]: row["reason"] for row in listed["data"]} == reasons
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = server.http.get(path, params={"limit": 3, **after}).json()
        seen += [row["id"] for row in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert seen == [row["id"] for row in listed["data"]]


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("/v1/feedback", 400, "inference_id"),
        ("/v1/feedback?inference_id=chatcmpl-nobody", 404, "inference_id"),
        ("/v1/feedback?inference_id=x&limit=0", 400, "limit"),
        ("/v1/datasets/nothing/set_aside", 404, "dataset_id"),
    ],
)
def test_what_is_not_there_is_named(shared_server: RunningServer, path: str, status: int, param: str) -> None:
    refused = shared_server.http.get(path)
    assert refused.status_code == status
    assert refused.json()["error"]["param"] == param
    assert shared_server.openai.models.retrieve(POLICY).id == POLICY
