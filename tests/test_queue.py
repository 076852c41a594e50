"""The labelling queue: whose a comparison is and until when, how many look at it, and gold, which measures and never trains."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.server import POLICY, RunningServer, fake_config, user_of

from pairloop.loop import pairs, privacy, raters
from pairloop.store import feedback, marks, queue, reservations
from pairloop.store import gold as gold_items
from pairloop.store.schema import reservations as table
from pairloop.types import RELABELLED_TAG, Label, Pool

ANN, BOB, CARLA = (user_of(Pool.TRAIN, number) for number in (1, 2, 3))
ASKER = user_of(Pool.TRAIN)


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """Without repeats and gold; a parameter overrides."""
    sections = {"feedback": {"repeat_share": 0.0}, "queue": {"gold_share": 0.0}} | getattr(request, "param", {})
    with RunningServer(tmp_path / "state", config=fake_config(tmp_path, **sections)) as running:
        yield running


def asked(server: RunningServer, n: int, user: str = ASKER) -> list[str]:
    return [server.chat(n=2, user=user, messages=[{"role": "user", "content": f"case {i}"}]).json()["id"] for i in range(n)]


def take(server: RunningServer, rater_id: str) -> Any:
    reply = server.http.post("/v1/queue/reservations", json={"rater_id": rater_id})
    assert reply.status_code == 200, reply.text
    return reply.json()["item"]


def pick(server: RunningServer, item: Any, place: int | None = 0, **fields: Any) -> Any:
    """The answer in a place, or a skip."""
    said = {"outcome": "skip"} if place is None else {"outcome": "chosen", "chosen_index": item["shown_order"][place]}
    body = {"inference_id": item["inference_id"], "reservation_id": item["id"], "latency_ms": 4_000, **said, **fields}
    return server.http.post("/v1/preferences", json=body)


def label(server: RunningServer, rater_id: str, place: int | None = 0) -> Any:
    item = take(server, rater_id)
    assert pick(server, item, place).status_code == 201
    return item


def used(server: RunningServer) -> Any:
    return pairs.compile_new(server.store, None, server.config, parent=0)


def test_a_comparison_is_one_raters_until_it_is_answered_given_back_or_its_time_is_up(server: RunningServer) -> None:
    only = asked(server, 1)[0]
    mine = take(server, ANN)
    assert mine["inference_id"] == only
    assert take(server, ANN) == mine  # asked again, the same with the same sides
    assert take(server, BOB) is None
    assert server.http.get("/v1/queue", params={"rater_id": BOB}).json()["item"] is None

    assert server.http.delete(f"/v1/queue/reservations/{mine['id']}").json()["deleted"] is True
    assert server.http.delete(f"/v1/queue/reservations/{mine['id']}").json()["deleted"] is False
    his = take(server, BOB)
    assert his["inference_id"] == only
    assert take(server, ANN) is None

    past = datetime.now(UTC) - timedelta(seconds=1)
    server.store.write(lambda c: c.execute(sa.update(table).values(expires_at=past)))
    assert take(server, ANN)["inference_id"] == only
    assert pick(server, his).status_code == 201  # late, and not lost
    assert take(server, CARLA) is None


def at_once(server: RunningServer) -> list[str]:
    """The comparisons that seven people get who ask at the same time."""
    people = [user_of(Pool.TRAIN, number) for number in range(1, 8)]
    with ThreadPoolExecutor(len(people)) as pool:
        items = list(pool.map(lambda rater: raters.reserve(server.store, server.config, rater, rng=random.Random(1)), people))
    return sorted(item.group.group_id for item in items if item is not None)


def test_raters_who_ask_at_once_all_get_a_comparison_of_their_own(server: RunningServer) -> None:
    all_ids = asked(server, 6)
    assert at_once(server) == sorted(all_ids)  # one of seven got nothing


def test_without_a_look_in_the_transaction_two_would_get_the_same(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(server, 6)
    monkeypatch.setattr(queue, "has_room", lambda *_, **__: True)
    assert len(set(at_once(server))) < 6


def test_reservations_are_swept_a_day_after_they_end(server: RunningServer) -> None:
    asked(server, 2)
    item = label(server, ANN)
    long_ago = datetime.now(UTC) - timedelta(days=1, seconds=1)
    server.store.write(lambda c: c.execute(sa.update(table).values(expires_at=long_ago)))
    assert take(server, BOB) is not None
    refused = pick(server, item)
    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "reservation_id"


@pytest.mark.parametrize("server", [{"queue": {"reviewers": 2, "gold_share": 0.0}}], indirect=True)
def test_so_many_different_people_look_and_a_skip_is_no_look(server: RunningServer) -> None:
    only = asked(server, 1)[0]
    label(server, ANN, None)
    assert take(server, ANN) is None  # not again to who skipped it
    label(server, BOB)
    assert take(server, BOB) is None
    held = take(server, CARLA)
    assert held["inference_id"] == only
    assert take(server, user_of(Pool.TRAIN, 4)) is None  # the second look is under way
    pick(server, held)
    assert take(server, user_of(Pool.TRAIN, 4)) is None
    found = raters.progress(server.store, server.config, BOB)
    assert (found.left[Pool.TRAIN].open, found.mine_today, dict(found.today)) == (0, 1, {ANN: 1, BOB: 1, CARLA: 1})
    assert found.agreement is not None
    assert (found.agreement.rate.n, found.agreement.picks) == (1, 2)


def test_an_answer_is_revised_through_its_reservation(server: RunningServer) -> None:
    asked(server, 1)
    item = label(server, ANN, 0)
    again = pick(server, item, 1)
    assert (again.status_code, again.json()["revision"]) == (201, 1)
    (pair,) = used(server).compiled.pairs
    assert pair.chosen.text == item["choices"][1]["text"]


REFUSED: list[tuple[dict[str, Any], int, str | None]] = [
    ({"rater_id": BOB}, 409, None),
    ({"shown_order": [0, 1]}, 409, None),
    ({"shown_order": [1, 0]}, 409, None),
    ({"inference_id": "chatcmpl-none"}, 404, "inference_id"),
    ({"source": "llm"}, 400, "source"),
    ({"edited_text": "x"}, 400, "edited_text"),
    ({"repeat": True}, 400, "repeat"),
    ({"reservation_id": "reservation_none"}, 404, "reservation_id"),
]


def test_what_a_reservation_is_not_for_is_refused(server: RunningServer) -> None:
    other = asked(server, 2)
    item = take(server, ANN)
    other.remove(item["inference_id"])
    for fields, status, param in [*REFUSED, ({"inference_id": other[0]}, 409, None)]:
        if fields.get("shown_order") != item["shown_order"]:
            refused = pick(server, item, **fields)
            assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), fields
    assert pick(server, item, rater_id=ANN, shown_order=item["shown_order"]).status_code == 201


@pytest.mark.parametrize("server", [{"queue": {"gold_share": 1.0}}], indirect=True)
def test_gold_is_mixed_in_unseen_measures_its_rater_and_never_trains(server: RunningServer) -> None:
    gold, *_ = asked(server, 3)
    body = {"inference_id": gold, "chosen_index": 1, "reason": "0 invents a number"}
    assert server.http.post("/v1/queue/gold", json=body).status_code == 201
    assert server.http.post("/v1/queue/gold", json=body).status_code == 409
    before = used(server)

    item = take(server, ANN)
    assert item["inference_id"] == gold
    assert set(item) == {"id", "inference_id", "messages", "choices", "shown_order", "expires_at"}  # nothing tells
    assert pick(server, item, item["shown_order"].index(1)).status_code == 201
    wrong = take(server, BOB)
    assert wrong["inference_id"] == gold  # everybody gets it, whoever else has it
    pick(server, wrong, wrong["shown_order"].index(0))
    assert take(server, ANN)["inference_id"] != gold  # once

    after = used(server)
    assert (after.compiled.pairs, after.dropped["gold"]) == (before.compiled.pairs, 2)
    assert pairs.count_new(server.store, server.config) == 0
    accuracy = {one.rater_id: one.gold for one in raters.overview(server.store, server.config).profiles}
    assert [(one.mean, one.n) for one in (accuracy[ANN], accuracy[BOB]) if one is not None] == [(1.0, 1), (0.0, 1)]

    assert server.http.get("/v1/queue/gold").json()["data"][0]["id"] == gold
    back = server.http.post(f"/v1/queue/gold/{gold}/take_back", json={"reason": "both are right"})
    assert back.json()["chosen_index"] == 1
    assert server.http.get("/v1/queue/gold").json()["data"] == []
    assert all(one.gold is None for one in raters.overview(server.store, server.config).profiles)
    acts = [entry["action"] for entry in server.http.get("/v1/audit").json()["data"]]
    assert acts == ["gold_remove", "gold_add"]


@pytest.mark.parametrize("server", [{"queue": {"reviewers": 3, "gold_share": 0.0}}], indirect=True)
def test_what_all_agreed_on_can_become_gold_and_one_other_voice_forbids_it(server: RunningServer) -> None:
    agreed, disputed, thin = asked(server, 3)
    for rater in (ANN, BOB, CARLA):
        for group, index in ((agreed, 1), (disputed, int(rater == CARLA)), (thin, 0)):
            if group == thin and rater != ANN:
                continue
            body = {"inference_id": group, "rater_id": rater, "chosen_index": index, "latency_ms": 3_000}
            body |= {"tags": {"about": RELABELLED_TAG}}  # the name alone makes no operator's word of it
            assert server.http.post("/v1/preferences", json=body).status_code == 201
    foreseen = server.http.post("/v1/queue/gold/unanimous", json={"min_raters": 3, "dryrun": True}).json()
    assert foreseen["data"] == [{"inference_id": agreed, "chosen_index": 1, "raters": 3}]
    assert server.http.get("/v1/queue/gold").json()["data"] == []
    assert server.http.post("/v1/queue/gold/unanimous", json={"min_raters": 3}).json()["data"] == foreseen["data"]
    assert server.http.post("/v1/queue/gold/unanimous", json={"min_raters": 3}).json()["data"] == []
    (item,) = server.http.get("/v1/queue/gold").json()["data"]
    assert (item["id"], item["origin"]) == (agreed, "unanimous")
    assert used(server).compiled.pairs  # the votes that made it gold still count


@pytest.mark.parametrize("server", [{"feedback": {"repeat_share": 1.0, "repeat_after": 1}}], indirect=True)
def test_a_repeat_comes_with_its_sides_swapped_and_the_reservation_knows_it(server: RunningServer) -> None:
    asked(server, 3)
    first, _ = label(server, ANN, 0), label(server, ANN, 0)
    again = take(server, ANN)
    assert (again["inference_id"], again["shown_order"]) == (first["inference_id"], first["shown_order"][::-1])
    assert pick(server, again, 0).status_code == 201
    flips = server.http.get("/v1/rater_checks").json()["flip_rate"]
    assert (flips["pairs"], flips["disagreements"]) == (1, 1)
    assert used(server).dropped["repeat"] == 1


def test_an_erased_raters_reservations_go(server: RunningServer) -> None:
    asked(server, 2)
    label(server, ANN)
    held = take(server, ANN)
    privacy.erase(server.store, server.config, ANN, reason="asked for it")
    with server.store.reading() as c:
        assert reservations.get(c, held["id"]) is None


def test_the_queues_own_metrics_are_nobody_elses(server: RunningServer) -> None:
    group = asked(server, 1)[0]
    for metric in ("gold", "repeat"):
        body = {"inference_id": group, "metric_name": metric, "value": True, "choice_index": 0}
        refused = server.http.post("/v1/feedback", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "metric_name")


def test_what_an_operator_sends_comes_first_to_one_rater_at_a_time(server: RunningServer) -> None:
    asked(server, 1)
    known = label(server, ANN)["inference_id"]
    asked(server, 2)
    sent = server.http.post("/v1/groups/enqueue", json={"ids": [known], "reason": "another look"})
    assert sent.status_code == 200, sent.text
    assert take(server, BOB)["inference_id"] == known
    assert take(server, CARLA)["inference_id"] != known
    assert take(server, ANN)["inference_id"] != known


def test_neither_gold_nor_duels_become_votes_by_being_sent_here(server: RunningServer) -> None:
    gold, other = asked(server, 2)
    body = {"inference_id": gold, "chosen_index": 1, "reason": "0 invents a number"}
    assert server.http.post("/v1/queue/gold", json=body).status_code == 201
    server.add_version(1)
    server.open_duel(1)
    judge = user_of(Pool.GATE)
    duel = next(one for one in (asked(server, 1, user=judge)[0] for _ in range(40)) if server.group(one).duel_id is not None)
    sent = server.http.post("/v1/groups/enqueue", json={"ids": [gold, duel], "reason": "another look"})
    assert sent.status_code == 200, sent.text
    assert take(server, ANN)["inference_id"] == other
    with server.store.reading() as c:
        assert [marks.queued(c, POLICY, pool, "somebody", 10) for pool in Pool] == [[], []]


def test_what_an_operator_relabelled_is_no_agreement_and_a_skip_stays_one(server: RunningServer) -> None:
    (one,) = asked(server, 1)
    for rater, said in ((ANN, {"outcome": "chosen", "chosen_index": 0}), (BOB, {"outcome": "chosen", "chosen_index": 1})):
        assert server.http.post("/v1/preferences", json={"inference_id": one, "rater_id": rater, **said}).status_code == 201
    skip = {"inference_id": one, "rater_id": CARLA, "outcome": "skip"}
    assert server.http.post("/v1/preferences", json=skip).status_code == 201
    changed = server.http.post("/v1/groups/relabel", json={"ids": [one], "label": "A", "reason": "A is right"})
    assert changed.status_code == 200, changed.text
    with server.store.reading() as c:
        newest = {row.rater_id: row.label for row in feedback.latest_revisions(feedback.history(c, one))}
        assert gold_items.unanimous(c, POLICY, min_raters=2, newest=100, limit=10) == []
    assert newest == {ANN: Label.A, BOB: Label.A, CARLA: Label.SKIP}


@pytest.mark.parametrize("server", [{"queue": {"gold_share": 1.0}}], indirect=True)
def test_lineage_tells_gold_from_a_pick_by_nothing(server: RunningServer) -> None:
    gold, _ = asked(server, 2)
    body = {"inference_id": gold, "chosen_index": 1, "reason": "0 invents a number"}
    assert server.http.post("/v1/queue/gold", json=body).status_code == 201
    item = take(server, ANN)
    said = pick(server, item).json()["feedback_id"]
    (row,) = server.http.get("/v1/lineage", params={"feedback_id": said}).json()["data"]
    assert (item["inference_id"], row["metric_name"]) == (gold, "preference")
