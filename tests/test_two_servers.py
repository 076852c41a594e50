"""Two servers on one database and one artifact folder: what one of them does, both answer with."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.server import POLICY, RunningServer, user_of
from tests.waiting import until

from pairloop.policy.fake import FakePolicy
from pairloop.store import groups, replies
from pairloop.types import CycleState, GroupKind, Pool

Pair = tuple[RunningServer, RunningServer]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    with ExitStack() as running:
        one = running.enter_context(RunningServer(folder / "one"))
        yield one, running.enter_context(RunningServer(folder / "two", beside=one))


def test_a_promotion_and_a_rollback_are_answered_by_both(pair: Pair) -> None:
    one, two = pair
    one.add_version(1)
    assert two.http.post(f"/v1/versions/{POLICY}@1/promote", json={"reason": "better"}).status_code == 200
    for server in pair:
        reply = server.chat(n=2)
        assert reply.headers["x-pairloop-model-version"] == f"{POLICY}@1"
        assert {answer.version for answer in two.group(reply.json()["id"]).completions} == {1}
    assert one.http.post(f"/v1/policies/{POLICY}/rollback", json={"reason": "worse"}).status_code == 200
    assert [server.chat().headers["x-pairloop-model-version"] for server in pair] == [f"{POLICY}@0"] * 2


def test_a_duel_of_one_is_fought_at_both_and_ends_at_both(pair: Pair) -> None:
    one, two = pair
    one.add_version(2)
    duel = one.open_duel(2)
    judges = [user_of(Pool.GATE, number) for number in range(12)]
    kinds = [two.group(server.chat(n=2, user=judge).json()["id"]).kind for judge in judges for server in pair]
    assert set(kinds) == {GroupKind.DUEL}
    two.close_duel(duel, CycleState.REJECTED)
    after = [two.group(server.chat(n=2, user=judges[0]).json()["id"]).kind for server in pair]
    assert after == [GroupKind.HELDOUT] * 2


def test_a_pick_at_the_other_server_counts_once(pair: Pair) -> None:
    one, two = pair
    group_id = one.chat(n=2).json()["id"]
    pick = {"inference_id": group_id, "chosen_index": 1, "id": "pick-1"}
    first, again = two.http.post("/v1/preferences", json=pick), one.http.post("/v1/preferences", json=pick)
    assert (first.status_code, again.status_code) == (201, 200), first.text + again.text
    assert again.json()["duplicate"] is True


def test_a_request_sent_to_both_under_one_key_is_done_once(tmp_path: Path) -> None:
    release = threading.Event()
    key = {"idempotency-key": "one"}
    with ExitStack() as running:
        one = running.enter_context(RunningServer(tmp_path / "one", policy=FakePolicy(release=release)))
        two = running.enter_context(RunningServer(tmp_path / "two", beside=one))
        with ThreadPoolExecutor(2) as clients:
            first = clients.submit(one.post_chat, key)
            until(lambda: one.policy.queued() > 0)
            second = clients.submit(two.post_chat, key)
            release.set()
            replies_ = [reply.result(20) for reply in (first, second)]
        assert [reply.status_code for reply in replies_] == [200, 200]
        assert replies_[0].json() == replies_[1].json()
        assert replies_[1].headers["idempotent-replayed"] == "true"
        with one.store.reading() as c:
            assert groups.count(c, POLICY) == 1


def test_a_key_that_a_dead_server_took_is_free_again(pair: Pair) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = f"{socket.gethostname()}:{dead.pid}/request_1"
    now = datetime.now(UTC)
    assert pair[0].store.write(lambda c: replies.take(c, "", "dead", owner, now=now, is_gone=lambda _: False)) is None
    reply = pair[1].post_chat({"idempotency-key": "dead"})
    assert (reply.status_code, "idempotent-replayed" in reply.headers) == (200, False)
    assert pair[0].post_chat({"idempotency-key": "dead"}).json() == reply.json()
