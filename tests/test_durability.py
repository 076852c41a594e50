"""When a write is acknowledged, by setting; what a killed process loses (nothing); what a blocked database does to clients."""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, get_args

import httpx
import pytest
from tests.server import RunningServer, fake_config
from tests.store_rows import BOT, Blocked, a_group, put_groups, read
from tests.stores import open_store
from tests.waiting import PATIENCE_S, until

from pairloop.config import Config, Durability, StoreSection, parse_config
from pairloop.errors import ConfigError, PairloopError, StoreBusyError
from pairloop.loop.feedback import MetricValue, Pick, submit_metric, submit_preference
from pairloop.store import Store, feedback, groups
from pairloop.store import writer as writer_module
from pairloop.store.database import broken_pages
from pairloop.store.writer import Committed, GroupCommitWriter, Limits

DURABILITIES: tuple[Durability, ...] = get_args(Durability)
REPOSITORY = str(Path(__file__).parents[1])


def configured(folder: Path, **store: Any) -> Config:
    return Config(state_dir=folder, store=StoreSection(**store))


# --- acknowledged is there: killed processes

KILLED = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.store_rows import a_group, a_pick
from pairloop.config import Config, StoreSection
from pairloop.store import Store, feedback, groups
early = sys.argv[3] == "early"
section = StoreSection(durability="group" if early else sys.argv[3], database=sys.argv[4])
store = Store.open(Config(state_dir=Path(sys.argv[1]), store=section))
def write(fn):
    (store.submit(fn, admitted=True) if early else store.write(fn))
def work(thread):
    for number in range(100_000):
        group, pick = a_group(f"{thread}-{number}"), a_pick(f"{thread}-{number}")
        write(lambda c: groups.insert(c, group))
        write(lambda c: feedback.insert(c, pick))
        sys.stdout.write(f"{group.group_id} {pick.feedback_id}\\n")
        sys.stdout.flush()
for thread in range(8):
    threading.Thread(target=work, args=(thread,)).start()
"""


def lost_by_a_kill(folder: Path, mode: str) -> list[str]:
    """Of what a process acknowledged before it was killed, the lines whose rows are not whole."""
    command = [sys.executable, "-c", KILLED, str(folder), REPOSITORY, mode, Config(state_dir=folder).database_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        acknowledged = [child.stdout.readline() for _ in range(120)]
        child.send_signal(signal.SIGKILL)
        acknowledged += child.stdout.read().splitlines(keepends=True)
    whole = [line for line in acknowledged if line.endswith("\n")]
    assert len(whole) >= 120
    lost = []
    with Store.open(Config(state_dir=folder)) as store, store.reading() as c:
        assert broken_pages(c) == []
        for line in whole:
            group_id, feedback_id = line.split()
            group, picks = groups.get(c, group_id), feedback.for_group(c, group_id)
            texts = [] if group is None else [answer.text for answer in group.completions]
            if texts != ["yes", "no"] or [pick.feedback_id for pick in picks] != [feedback_id]:
                lost.append(line)
    return lost


@pytest.mark.parametrize("durability", DURABILITIES)
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, durability: Durability) -> None:
    assert lost_by_a_kill(tmp_path, durability) == []


@pytest.mark.slow
def test_a_store_that_acknowledges_before_the_commit_is_found_out(tmp_path: Path) -> None:
    assert lost_by_a_kill(tmp_path, "early") != []


# --- acknowledged is on the disk: transactions and fsyncs


@pytest.mark.sqlite("its PRAGMAs")
@pytest.mark.parametrize(
    ("durability", "transactions", "synchronous"), [("commit", [1] * 20, 2), ("group", [20], 2), ("async", [20], 1)]
)
def test_how_waiting_writes_share_their_commits(
    tmp_path: Path, durability: Durability, transactions: list[int], synchronous: int
) -> None:
    with Store.open(configured(tmp_path, durability=durability)) as store:
        assert store.write(lambda c: c.exec_driver_sql("PRAGMA synchronous").scalar()) == synchronous
        assert store.write(lambda c: c.exec_driver_sql("PRAGMA journal_mode").scalar()) == "wal"
        blocked, seen = Blocked(store), list[Committed]()
        futures = [store.submit(partial(groups.insert, group=a_group(f"g{n}"))) for n in range(20)]
        assert store.waiting == 21
        store.watch_commits(seen.append)
        blocked.release()
        for future in futures:
            future.result()
        store.write(lambda _: None)
    assert [one.batch for one in seen] == [1, *transactions, 1]
    assert seen[-2].waiting == 0
    assert all(0 < one.commit_s < 10 for one in seen)


def test_async_writes_are_on_the_disk_within_a_moment_of_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FLUSH_EVERY_S", 0.05)
    flushed, trouble = threading.Event(), [OSError("the disk is gone")]

    def flush() -> None:
        if trouble:
            raise trouble.pop()
        flushed.set()

    with (
        Store.open(Config(state_dir=tmp_path)) as store,
        closing(GroupCommitWriter(store._writing, "x", flush=flush)) as writer,
    ):
        assert not flushed.wait(0.2), "nothing was written"
        writer.write(lambda c: groups.insert(c, a_group()))
        until(lambda: not trouble)  # the first flush fails, which is said in the log, and the writer goes on
        writer.write(lambda c: groups.insert(c, a_group()))
        assert flushed.wait(PATIENCE_S)
        flushed.clear()
        writer.write(lambda c: groups.insert(c, a_group()))
    assert flushed.is_set(), "the last writes are flushed at the end"


WRITING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.store_rows import a_group
from pairloop.config import Config, StoreSection
from pairloop.store import Store, groups
with Store.open(Config(state_dir=Path(sys.argv[1]), store=StoreSection(durability=sys.argv[3]))) as store:
    print("begin", file=sys.stderr, flush=True)
    for batch in range(5):
        for future in [store.submit(lambda c, n=n: groups.insert(c, a_group(f"{batch}-{n}"))) for n in range(40)]:
            future.result()
    print("end", file=sys.stderr, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(("durability", "fewest", "most"), [("commit", 200, 10_000), ("group", 5, 100), ("async", 0, 4)])
def test_the_fsyncs_that_the_system_sees(tmp_path: Path, durability: Durability, fewest: int, most: int) -> None:
    traced = tmp_path / "strace"
    command = ["strace", "-f", "-e", "trace=fsync,fdatasync,write", "-o", str(traced), sys.executable, "-c", WRITING]
    subprocess.run([*command, str(tmp_path / "state"), REPOSITORY, durability], check=True, stderr=subprocess.DEVNULL)
    lines = traced.read_text().splitlines()
    (begin,) = [place for place, line in enumerate(lines) if 'write(2, "begin' in line]
    (end,) = [place for place, line in enumerate(lines) if 'write(2, "end' in line]
    synced = sum("sync(" in line for line in lines[begin:end])
    assert fewest <= synced <= most


# --- what waits together is written together, and comes out as if each had been alone


def told(future: Future[Any]) -> tuple[Any, ...]:
    error = future.exception()
    if error is not None:
        assert isinstance(error, PairloopError), error
        return type(error).__name__, str(error)
    recorded = future.result()
    row = recorded.feedback
    return row.group_id, row.rater_id, row.label, row.value, row.text, row.revision, recorded.duplicate, recorded.versions


def requests(draw: random.Random, names: list[str]) -> list[Callable[[Store], Future[Any]]]:
    """Picks and values, new, sent again, revised, and wrong."""
    made: list[Callable[[Store], Future[Any]]] = []
    for number in range(draw.choice([3, 90])):
        name = draw.choice([*names * 3, "unknown", "single", "abandoned"])
        rater, given = draw.choice(["ann", "bob", None]), draw.choice([None, None, f"id-{draw.randrange(8)}"])
        if draw.random() < 0.3:
            values: list[bool | float | str] = [True, 0.0, 2.5, "fine"]
            value = draw.choice(values)
            metric = draw.choice(["thumbs", "score", "mine"])
            made.append(partial(submit_metric, value=MetricValue(name, metric, value, 0, "why", rater, feedback_id=given)))
        else:
            pick = Pick(
                name,
                chosen_index=draw.choice([0, 1, 1, 7]),
                shown_order=draw.choice([(), (1, 0)]),
                reason=draw.choice([None, "schön"]),
                edited_text=draw.choice([None, None, "better", " "]),
                rater_id=rater,
                latency_ms=draw.choice([None, 2_000 + number]),
                tags=draw.choice([{}, {"from": "a test"}]),
                feedback_id=given,
            )
            made.append(partial(submit_preference, pick=pick))
    return made


@pytest.mark.parametrize("seed", range(6))
def test_what_waits_together_is_as_if_each_had_been_alone(tmp_path: Path, seed: int) -> None:
    draw, names = random.Random(seed), [f"g{number}" for number in range(40)]
    outcomes, rows = [], []
    asked = requests(draw, names)
    for place in ("together", "alone"):
        with open_store(tmp_path / place) as store:
            put_groups(store, a_group("single", answers=("one",)), a_group("abandoned", answers=()), *map(a_group, names))
            if place == "together":
                blocked = Blocked(store)
                futures = [submit(store) for submit in asked]
                blocked.release()
                outcomes.append([told(future) for future in futures])
            else:
                outcomes.append([told(submit(store)) for submit in asked])
            with store.reading() as c:
                found = [row for name in ["single", *names] for row in feedback.history(c, name)]
            rows.append(sorted((row.group_id, row.rater_id, row.metric, row.choice_index or 0, row.revision) for row in found))
    assert outcomes[0] == outcomes[1]
    assert rows[0] == rows[1]


# --- back-pressure


def test_beyond_its_bounds_the_queue_refuses_clients_and_nobody_else(tmp_path: Path) -> None:
    with open_store(tmp_path / "artifacts", configured(tmp_path, max_waiting=5, max_wait="300s")) as store:
        blocked = Blocked(store)
        taken = [store.submit(partial(groups.insert, group=a_group(f"g{n}"))) for n in range(4)]
        assert store.is_busy
        with pytest.raises(StoreBusyError, match=r"5 writes wait.*store\.max_waiting = 5"):
            store.submit(partial(groups.insert, group=a_group("refused")))
        heartbeat = store.submit(partial(groups.insert, group=a_group("admitted")), admitted=True)
        blocked.release()
        for future in (*taken, heartbeat):
            future.result()
        put_groups(store, a_group("later"))
        assert not store.is_busy
        assert store.waiting == 0
        assert read(store, groups.count, BOT) == 6
        assert read(store, groups.get, "refused") is None


@pytest.mark.sqlite("its busy timeout")
def test_what_waited_too_long_is_refused_when_the_database_refuses(tmp_path: Path) -> None:
    """Else each further batch would wait as long for the same lock, one after the other."""
    with Store.open(Config(state_dir=tmp_path)) as opened:
        limits = Limits(batch=1, wait_s=0.05)
        with (
            closing(sqlite3.connect(tmp_path / "pairloop.sqlite", isolation_level=None)) as other,
            closing(GroupCommitWriter(opened._writing, "x", limits=limits)) as writer,
        ):
            writer.write(lambda c: c.exec_driver_sql("PRAGMA busy_timeout = 300").scalar_one())
            other.execute("BEGIN IMMEDIATE")
            first, *rest = [writer.submit(partial(groups.insert, group=a_group(f"g{n}"))) for n in range(20)]
            admitted = writer.submit(partial(groups.insert, group=a_group("admitted")), admitted=True)
            begun = monotonic()
            assert "locked" in str(first.exception())
            assert all(isinstance(future.exception(), StoreBusyError) for future in rest)
            other.execute("COMMIT")
            admitted.result()
            assert monotonic() - begun < 5
        assert read(opened, groups.count, BOT) == 1


@pytest.mark.sqlite("its busy timeout")
def test_a_blocked_database_refuses_in_time_and_goes_on_afterwards(tmp_path: Path) -> None:
    config = fake_config(tmp_path, store={"max_waiting": 8, "max_wait": "200s"})
    with RunningServer(tmp_path / "state", config=config) as server, ThreadPoolExecutor(40) as clients:
        with closing(sqlite3.connect(str(server.store.url.database), isolation_level=None)) as other:
            inference_id = server.chat(n=2, user="ann").json()["id"]

            def pick(rater: int) -> httpx.Response:
                body = {"inference_id": inference_id, "chosen_index": 0, "rater_id": f"rater-{rater}", "id": f"pick-{rater}"}
                return server.http.post("/v1/preferences", json=body)

            server.store.write(lambda c: c.exec_driver_sql("PRAGMA busy_timeout = 60000").scalar_one())
            other.execute("BEGIN IMMEDIATE")
            sent = {rater: clients.submit(pick, rater) for rater in range(30)}
            until = monotonic() + 20
            while sum(future.done() for future in sent.values()) < 22 and monotonic() < until:
                threading.Event().wait(0.02)
            refused = [future.result() for future in sent.values() if future.done()]
            assert len(refused) == 22, "eight wait, the others are told at once"
            for reply in refused:
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "store_busy")
                assert reply.headers["retry-after"] == "1"
            begun = monotonic()
            assert server.chat(n=2).json()["error"]["code"] == "store_busy"
            assert server.http.post("/v1/cycles", json={}).json()["error"]["code"] == "store_busy"
            assert server.http.get("/v1/models").status_code == 200
            assert "pairloop_writes_waiting 8.0" in server.http.get("/metrics").text
            assert monotonic() - begun < 5
            beat = clients.submit(server.store.write, lambda c: c.exec_driver_sql("SELECT 1").scalar())
            other.execute("COMMIT")
        assert beat.result() == 1
        waited = [rater for rater, future in sent.items() if future.result().status_code == 201]
        assert len(waited) == 8
        again = {rater: pick(rater) for rater in sent}
        assert {rater for rater, reply in again.items() if reply.json()["duplicate"]} == set(waited)
        with server.store.reading() as c:
            assert sorted(row.feedback_id for row in feedback.history(c, inference_id)) == sorted(f"pick-{n}" for n in sent)
        text = server.http.get("/metrics").text
        assert "pairloop_commit_seconds_count" in text
        assert 'pairloop_commit_batch_bucket{le="8.0"}' in text


def test_an_oldest_write_that_waits_for_too_long_closes_the_door(tmp_path: Path) -> None:
    with open_store(tmp_path / "artifacts", configured(tmp_path, max_wait="1s")) as store:
        blocked = Blocked(store)
        until = monotonic() + 10
        while not store.is_busy and monotonic() < until:
            threading.Event().wait(0.02)
        with pytest.raises(StoreBusyError, match=r"store\.max_wait = 1s"):
            store.submit(lambda _: None)
        blocked.release()
        store.submit(lambda _: None).result()


def test_settings_that_are_no_durability_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"store\.durability"):
        parse_config({"store": {"durability": "eventual"}})
    with pytest.raises(ConfigError, match=r"store\.max_wait"):
        parse_config({"store": {"max_wait": "soon"}})
    with pytest.raises(ConfigError, match=r"store\.max_waiting"):
        parse_config({"store": {"max_waiting": 0}})
