"""The labelling queue and its repeats: what is asked again, sides swapped, is no vote, and measures how often picks flip."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.loop_rig import Rig, open_rig
from tests.loop_rig import settings as rig_settings
from tests.server import RunningServer, fake_config, user_of

from pairloop.loop import cycle, pairs, raters, train
from pairloop.loop.feedback import Pick, submit_repeat
from pairloop.loop.raters.flips import MIN_REPEATS
from pairloop.redaction import Redactor
from pairloop.store import audit, datasets, feedback, runs
from pairloop.store.quarantines import Action
from pairloop.types import CycleState, GroupKind, Pool

RATER = user_of(Pool.TRAIN)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    config = fake_config(tmp_path, feedback={"repeat_share": 1.0, "repeat_after": 2})
    with RunningServer(tmp_path / "state", config=config) as running:
        yield running


def asked(server: RunningServer, user: str = RATER) -> dict[str, Any]:
    reply: dict[str, Any] = server.chat(
        n=2, user=user, messages=[{"role": "user", "content": f"case {random.random()}"}]
    ).json()
    return reply


def pick(server: RunningServer, group_id: str, **fields: Any) -> Any:
    body = {"inference_id": group_id, "chosen_index": 0, "shown_order": [0, 1], "rater_id": RATER, "latency_ms": 5_000}
    return server.http.post("/v1/preferences", json=body | fields)


def queue(server: RunningServer, rater_id: str = RATER, **params: Any) -> Any:
    reply = server.http.get("/v1/queue", params={"rater_id": rater_id, **params})
    assert reply.status_code == 200, reply.text
    return reply.json()["item"]


def test_a_pick_comes_again_once_with_its_sides_swapped_and_counts_for_nothing(server: RunningServer) -> None:
    groups = [asked(server)["id"] for _ in range(3)]
    assert queue(server, repeats_only=True) is None
    for group in groups:
        assert pick(server, group).status_code == 201
    before = pairs.compile_new(server.store, None, server.config, parent=0)

    item = queue(server, repeats_only=True)
    assert (item["inference_id"], item["shown_order"], item["repeat"]) == (groups[0], [1, 0], True)
    assert [choice["index"] for choice in item["choices"]] == [1, 0]
    said = pick(server, groups[0], chosen_index=1, shown_order=item["shown_order"], repeat=True)
    assert (said.status_code, said.json()["revision"]) == (201, 0)
    assert queue(server, repeats_only=True) is None  # the other two are too fresh

    after = pairs.compile_new(server.store, None, server.config, parent=0)
    assert after.compiled.pairs == before.compiled.pairs
    assert after.dropped["repeat"] == 1
    found = server.http.get("/v1/rater_checks").json()
    assert [(one["id"], one["picks"]) for one in found["data"]] == [(RATER, 3)]
    assert (found["flip_rate"]["pairs"], found["flip_rate"]["disagreements"]) == (1, 1)


def test_the_queue_gives_a_rater_what_nobody_picked_from_their_own_pool(server: RunningServer) -> None:
    judge = user_of(Pool.GATE)
    mine, theirs = asked(server)["id"], asked(server, judge)["id"]
    server.chat(n=1, user=RATER)  # one answer is no comparison
    assert queue(server)["inference_id"] == mine
    assert queue(server, judge)["inference_id"] == theirs
    assert sorted(queue(server)["shown_order"]) == [0, 1]
    pick(server, mine)
    assert queue(server) is None


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"shown_order": [0, 1]}, 409, "in this order before"),
        ({"rater_id": "somebody else"}, 409, "has not chosen"),
        ({"rater_id": None}, 400, "rater_id"),
        ({"shown_order": None}, 400, "shown_order"),
        ({"source": "llm"}, 400, "a person's"),
        ({"edited_text": "better"}, 400, "edited_text"),
        ({"inference_id": "chatcmpl-none"}, 404, "no inference"),
    ],
)
def test_what_is_no_repeat_is_refused(server: RunningServer, fields: dict[str, Any], status: int, says: str) -> None:
    group = asked(server)["id"]
    pick(server, group)
    refused = pick(server, group, **{"shown_order": [1, 0], "repeat": True} | fields)
    assert refused.status_code == status
    assert says in refused.json()["error"]["message"]


def test_quarantine_over_http_says_first_what_it_changes(server: RunningServer) -> None:
    for _ in range(3):
        pick(server, asked(server)["id"])
    path = f"/v1/raters/{RATER}"
    foreseen = server.http.post(f"{path}/quarantine", json={"reason": "always left", "dryrun": True}).json()
    assert (foreseen["pairs"], foreseen["picks"], foreseen["dryrun"]) == (3, 3, True)
    assert server.http.get(path).json()["quarantine"] is None
    assert pairs.count_new(server.store, server.config) == 3
    done = server.http.post(f"{path}/quarantine", json={"reason": "always left"}).json()
    assert done == foreseen | {"dryrun": False}
    assert server.http.get("/v1/raters").json()["data"][0]["quarantine"]["reason"] == "always left"
    assert pairs.count_new(server.store, server.config) == 0
    assert server.http.post(f"{path}/quarantine", json={"reason": "again"}).status_code == 409
    assert server.http.post(f"{path}/release", json={}).json()["error"]["param"] == "reason"
    assert server.http.post(f"{path}/release", json={"reason": "a broken mouse"}).json()["pairs"] == 3
    assert pairs.count_new(server.store, server.config) == 3


def test_a_rater_who_is_an_address_is_found_and_quarantined_by_it(server: RunningServer) -> None:
    server.store.redactor = Redactor(lambda text: text.replace("@", "[AT]"), b"key")
    who = "jane@mail.example"
    stored = server.store.redactor.identifier(who)
    group = asked(server)["id"]
    assert pick(server, group, rater_id=who).status_code == 201
    for name in (who, stored):
        assert server.http.get(f"/v1/raters/{name}").json()["id"] == stored
    done = server.http.post(f"/v1/raters/{who}/quarantine", json={"reason": "always left"})
    assert (done.status_code, done.json()["rater_id"], done.json()["pairs"]) == (200, stored, 1)
    assert server.http.get(f"/v1/raters/{who}").json()["quarantine"]["reason"] == "always left"
    with server.store.reading() as c:
        (entry,) = audit.list_(c)
    assert entry.subject == f"rater:{stored}"
    assert server.http.post(f"/v1/raters/{stored}/release", json={"reason": "a broken mouse"}).status_code == 200


# --- label smoothing


def repeat(rig: Rig, n: int, flipped: int) -> None:
    """The first ``n`` decisive picks are asked again; ``flipped`` of them are answered the other way."""
    for number, labelled in enumerate(decisive(rig)[:n]):
        row = labelled.feedback[0]
        same = {"A": 0, "B": 1}[str(row.label)]
        shown = tuple(reversed(row.shown_order or (0, 1)))
        again = Pick(
            row.group_id, chosen_index=1 - same if number < flipped else same, shown_order=shown, rater_id=row.rater_id
        )
        submit_repeat(rig.store, again).result()


def decisive(rig: Rig) -> Any:
    with rig.store.reading() as c:
        found, _ = feedback.labelled_since(c, rig.loop.name, after_seq=0, kinds=[GroupKind.TRAIN])
    return [one for one in found if str(one.feedback[0].label) in "AB"]


@pytest.mark.parametrize(("repeats", "expected"), [(MIN_REPEATS, 0.1127), (MIN_REPEATS - 1, 0.02)])
def test_training_takes_the_measured_flip_rate_once_enough_were_asked_twice(
    tmp_path: Path, repeats: int, expected: float
) -> None:
    config = rig_settings(tmp_path, train={"measured_smoothing": True, "label_smoothing": 0.02})
    with open_rig(config) as rig:
        rig.serve(60)
        repeat(rig, repeats, flipped=6)
        done = cycle.run(rig.loop, trigger="test")
        record = done.record(CycleState.TRAINING)
        assert record is not None
        assert record["smoothing"]["label_smoothing"] == pytest.approx(expected, abs=1e-3)
        assert record["smoothing"]["repeats"] == repeats
        with rig.store.reading() as c:
            run = runs.for_cycle(c, done.cycle_id)
            dataset = datasets.get(c, record["dataset_id"])
        assert run is not None
        assert dataset is not None
        job = (train.folder_of(rig.loop.config, run) / "job.json").read_text(encoding="utf-8")
        assert f'"label_smoothing": {record["smoothing"]["label_smoothing"]}' in job


def test_a_quarantined_rater_s_repeats_measure_nothing(tmp_path: Path) -> None:
    with open_rig(rig_settings(tmp_path)) as rig:
        rig.serve(20)
        repeat(rig, 1, flipped=1)
        found = raters.measured_flips(rig.store, rig.loop.config)
        assert found is not None
        assert found.disagreements == 1
        rater = decisive(rig)[0].feedback[0].rater_id
        raters.decide(rig.store, rig.loop.config, rater, Action.QUARANTINE, "flips", actor="test")
        assert raters.measured_flips(rig.store, rig.loop.config) is None
