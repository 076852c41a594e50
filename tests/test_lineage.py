"""What became of a pick: waiting, training, in a version that serves or not, left out and why; told to who has its id."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.server import POLICY, RunningServer, user_of

from pairloop.client import Client
from pairloop.loop import pairs
from pairloop.store import runs, versions
from pairloop.types import Alias, Pool, Run, RunStatus, Version, VersionKind

RATER = user_of(Pool.TRAIN)


@pytest.fixture
def server(serve: Callable[..., RunningServer]) -> RunningServer:
    return serve()


def picked(server: RunningServer, user: str = RATER, **said: Any) -> str:
    """The id of a pick of a new comparison."""
    group = server.chat(n=2, user=user, messages=[{"role": "user", "content": f"case {datetime.now(UTC)}"}]).json()
    body = {"inference_id": group["id"], "outcome": "chosen", "chosen_index": 0, "latency_ms": 4_000, **said}
    if body["outcome"] != "chosen":
        del body["chosen_index"]
    reply = server.http.post("/v1/preferences", json=body)
    assert reply.status_code == 201, reply.text
    return str(reply.json()["feedback_id"])


def told(server: RunningServer, *ids: str) -> list[dict[str, Any]]:
    reply = server.http.get("/v1/lineage", params={"feedback_id": list(ids)})
    assert reply.status_code == 200, reply.text
    data: list[dict[str, Any]] = reply.json()["data"]
    return data


def train_on(server: RunningServer, dataset_id: str | None, number: int, parent: int = 0) -> None:
    made = Version(POLICY, number, VersionKind.FULL, "x", f"hash-{number}", parent, dataset_id, None, datetime.now(UTC))
    server.store.write(lambda c: versions.insert(c, made))


def test_a_pick_is_followed_into_the_version_that_learned_from_it(server: RunningServer) -> None:
    pick = picked(server)
    (one,) = told(server, pick)
    assert (one["use"], one["label"], one["versions"], one["serving"]) == ("waiting", "A", [], False)
    assert [answer["tokens"] for answer in one["answers"]] == [10, 10]  # "answer NN" and its end
    assert {answer["version"] for answer in one["answers"]} == {f"{POLICY}@0"}

    dataset = pairs.run(server.store, None, server.config, cycle_id=None, parent=0)
    assert dataset is not None
    assert told(server, pick)[0]["use"] == "waiting"
    now = datetime.now(UTC)
    run = Run(
        "run_1",
        POLICY,
        None,
        dataset.dataset_id,
        0,
        RunStatus.RUNNING,
        "me",
        1,
        now + timedelta(hours=1),
        now,
        {},
        {},
        None,
        now,
    )
    server.store.write(lambda c: runs.insert(c, run))
    assert told(server, pick)[0]["use"] == "training"

    train_on(server, dataset.dataset_id, 1)
    (one,) = told(server, pick)
    assert (one["use"], one["versions"], one["serving"], one["datasets"]) == (
        "trained",
        [f"{POLICY}@1"],
        False,
        [dataset.dataset_id],
    )
    server.alias(Alias.CHAMPION, 1)
    assert told(server, pick)[0]["serving"]
    train_on(server, None, 2, parent=1)
    train_on(server, dataset.dataset_id, 3, parent=0)
    server.alias(Alias.CHAMPION, 2)  # descends from one that learned from it
    (one,) = told(server, pick)
    assert (one["versions"], one["serving"]) == ([f"{POLICY}@1", f"{POLICY}@3"], True)
    server.alias(Alias.CHAMPION, 0)
    assert not told(server, pick)[0]["serving"]


def test_what_trains_nothing_says_why(server: RunningServer) -> None:
    good, fast = picked(server), picked(server, latency_ms=10)
    tie, skip = picked(server, outcome="tie"), picked(server, outcome="skip")
    judge = picked(server, user_of(Pool.GATE))
    assert [one["use"] for one in told(server, good, fast, tie, skip, judge)] == [
        "waiting",
        "waiting",
        "noted",
        "noted",
        "examines",
    ]
    pairs.run(server.store, None, server.config, cycle_id=None, parent=0)
    late = picked(server)
    uses = [(one["use"], one["reason"]) for one in told(server, good, fast, judge, late)]
    assert uses == [("waiting", None), ("left_out", "instant_pick"), ("examines", None), ("waiting", None)]


def test_a_duel_is_not_unblinded_by_what_is_no_pick(server: RunningServer) -> None:
    server.policy.load(server.add_version(1))
    server.open_duel(1)
    judge = user_of(Pool.GATE)
    skip = picked(server, judge, outcome="skip")
    (one,) = told(server, skip)
    assert (one["use"], [answer["version"] for answer in one["answers"]]) == ("noted", [None, None])
    comment = server.http.post(
        "/v1/feedback", json={"inference_id": one["inference_id"], "metric_name": "comment", "value": "hm", "source_id": judge}
    ).json()["feedback_id"]
    assert [answer["version"] for answer in told(server, comment)[0]["answers"]] == [None, None]
    (one,) = told(server, picked(server, judge))
    assert one["use"] == "judged"
    assert {answer["version"] for answer in one["answers"]} == {f"{POLICY}@0", f"{POLICY}@1"}


def test_unknown_ids_are_left_out_and_bad_questions_are_refused(server: RunningServer) -> None:
    pick = picked(server)
    assert [one["id"] for one in told(server, "feedback_none", pick, pick)] == [pick]
    assert server.http.get("/v1/lineage").json()["error"]["param"] == "feedback_id"
    many = server.http.get("/v1/lineage", params={"feedback_id": [str(number) for number in range(51)]})
    assert (many.status_code, many.json()["error"]["param"]) == (400, "feedback_id")
    with Client(server.url) as client:
        assert [one.use for one in client.lineage(pick)] == ["waiting"]
