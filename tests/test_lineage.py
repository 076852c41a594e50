"""What became of a pick: waiting, training, in a version that serves or not, left out and why; told to who has its id."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.server import POLICY, RunningServer, user_of

from pairloop.client import Client
from pairloop.loop import pairs
from pairloop.store import duels, feedback, passed_over, runs, set_aside, versions
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
    duel_id = server.open_duel(1).duel_id
    judge = user_of(Pool.GATE)
    skip = picked(server, judge, outcome="skip")
    (one,) = told(server, skip)
    assert (one["use"], [answer["version"] for answer in one["answers"]]) == ("noted", [None, None])
    about = {"inference_id": one["inference_id"], "source_id": judge}
    values = ({"metric_name": "comment", "value": "hm"}, {"metric_name": "thumbs", "value": True, "choice_index": 0})
    said = [server.http.post("/v1/feedback", json=about | value).json()["feedback_id"] for value in values]
    for row in told(server, skip, *said):
        assert [answer["version"] for answer in row["answers"]] == [None, None]
        assert row["duel_id"] is None
    (one,) = told(server, picked(server, judge))
    assert (one["use"], one["duel_id"]) == ("judged", duel_id)
    assert {answer["version"] for answer in one["answers"]} == {f"{POLICY}@0", f"{POLICY}@1"}
    server.store.write(lambda c: duels.close(c, duel_id, datetime.now(UTC)))
    assert {one["duel_id"] for one in told(server, skip, *said)} == {duel_id}


def test_unknown_ids_are_left_out_and_bad_questions_are_refused(server: RunningServer) -> None:
    pick = picked(server)
    assert [one["id"] for one in told(server, "feedback_none", pick, pick)] == [pick]
    assert server.http.get("/v1/lineage").json()["error"]["param"] == "feedback_id"
    many = server.http.get("/v1/lineage", params={"feedback_id": [str(number) for number in range(51)]})
    assert (many.status_code, many.json()["error"]["param"]) == (400, "feedback_id")
    with Client(server.url) as client:
        assert [one.use for one in client.lineage(pick)] == ["waiting"]


def revised(server: RunningServer, pick: str) -> str:
    """The id of what its rater says after all: a tie."""
    body = {"inference_id": told(server, pick)[0]["inference_id"], "outcome": "tie", "latency_ms": 4_000}
    return str(server.http.post("/v1/preferences", json=body).json()["feedback_id"])


def reason_of(server: RunningServer, pick: str) -> str | None:
    """Why the newest decision left it out, where the preferences find it."""
    with server.store.reading() as c:
        kept = set_aside.reasons(c, [pick]).get(pick)
    return None if kept is None else kept[0]


def decide(server: RunningServer, verb: str, pick: str) -> None:
    group_id = told(server, pick)[0]["inference_id"]
    reply = server.http.post(f"/v1/groups/{verb}", json={"ids": [group_id], "reason": "looked at again"})
    assert (reply.status_code, reply.json()["changed"]) == (200, 1), reply.text


def compiled(server: RunningServer, parent: int) -> str:
    patient = server.config.model_copy(update={"pairs": server.config.pairs.model_copy(update={"max_staleness": 3})})
    dataset = pairs.run(server.store, None, patient, cycle_id=None, parent=parent)
    assert dataset is not None
    return dataset.dataset_id


def test_the_newest_dataset_decides_whether_a_row_has_a_reason(server: RunningServer) -> None:
    pick, fast, _ = picked(server), picked(server, latency_ms=10), picked(server)
    decide(server, "exclude", pick)
    compiled(server, 0)
    assert (reason_of(server, pick), told(server, pick)[0]["reason"]) == ("excluded", "excluded")
    decide(server, "include", pick)
    second = compiled(server, 0)
    assert (reason_of(server, pick), told(server, pick)[0]["datasets"]) == (None, [second])

    train_on(server, second, 1)
    group_id = told(server, pick)[0]["inference_id"]
    other = {"inference_id": group_id, "outcome": "tie", "rater_id": "somebody-else", "latency_ms": 4_000}
    assert server.http.post("/v1/preferences", json=other).status_code == 201
    picked(server)
    train_on(server, compiled(server, 1), 2, parent=1)
    assert reason_of(server, pick) is None, "beside the new vote it is context, and was trained on"
    assert [(one["use"], one["reason"]) for one in told(server, pick, fast)] == [
        ("trained", None),
        ("left_out", "instant_pick"),
    ]
    page = server.http.get(f"/preferences/{group_id}").text
    assert "Left out" not in page
    assert "An earlier round" not in page


def test_what_is_included_again_comes_once_though_a_version_was_promoted_meanwhile(server: RunningServer) -> None:
    pick, tie, _ = picked(server), revised(server, picked(server)), picked(server)
    decide(server, "exclude", pick)
    decide(server, "exclude", tie)
    train_on(server, compiled(server, 0), 1)
    picked(server)
    decide(server, "include", pick)
    decide(server, "include", tie)
    assert [(one["use"], one["reason"]) for one in told(server, pick)] == [("waiting", None)]
    second = compiled(server, 1)
    assert (told(server, pick)[0]["datasets"], reason_of(server, tie)) == ([second], "tie")

    train_on(server, second, 2, parent=1)  # it is not promoted: what it learned is new to the champion
    picked(server)
    third = compiled(server, 1)
    assert told(server, pick)[0]["datasets"] == [second, third]
    train_on(server, third, 3, parent=1)
    picked(server)
    fourth = compiled(server, 3)
    assert fourth not in told(server, pick)[0]["datasets"], "learned from once"
    assert server.http.get(f"/v1/datasets/{fourth}/set_aside").json()["data"] == []


def test_what_is_included_again_and_left_out_for_another_reason_has_that_reason_and_comes_no_more(
    server: RunningServer,
) -> None:
    pick, _ = picked(server, user_of(Pool.TRAIN, 5)), picked(server)
    train_on(server, compiled(server, 0), 1)  # learned from it, and was not promoted
    decide(server, "exclude", pick)
    picked(server)
    train_on(server, compiled(server, 0), 2)
    decide(server, "include", pick)
    with server.store.reading() as c:
        said = feedback.get(c, pick)
        assert said is not None
        assert passed_over.groups_of(c, POLICY, 2) == {said.group_id}
    reply = server.http.post("/v1/raters/quarantine", json={"rater_id": said.rater_id, "reason": "odd"})
    assert reply.status_code == 200, reply.text
    picked(server)
    compiled(server, 2)
    assert reason_of(server, pick) == "quarantined"
    with server.store.reading() as c:
        assert passed_over.groups_of(c, POLICY, 2) == frozenset()
