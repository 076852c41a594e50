"""Health: each planted trouble is told in words with what to do; the doctor looks when asked, and mends nothing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection
from tests.server import POLICY, RunningServer, World, fake_config, user_of
from tests.test_page_datasets import compiled, pick
from tests.test_page_schedule import EVIL, Turning, cycle

from pairloop.errors import StoreError, UnavailableError
from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import ReplicaState, ReplicaStatus
from pairloop.store import Store, cycles, events, leases
from pairloop.store.doctor import Problem
from pairloop.types import CycleState, CycleStep, Pool
from pairloop.web.checks import Check, checks, size_words, worst
from pairloop.web.context import Context
from pairloop.web.examination import Examination


def context_of(server: RunningServer) -> Context:
    context: Context = server.app.state.context
    return context


def states(server: RunningServer) -> dict[str, Check]:
    return {check.name: check for check in checks(context_of(server))}


def runbook() -> set[str]:
    text = (Path(__file__).parent.parent / "docs" / "runbook.md").read_text(encoding="utf-8")
    return {line.split("`")[1] for line in text.splitlines() if line.startswith("| `Pairloop")}


def test_each_trouble_is_told_with_what_to_do(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    hook = {"endpoints": [{"name": "ops", "url": "https://ops.example.com/hook", "secret_env": "X"}]}
    turning = Turning()
    server = serve(config=fake_config(tmp_path / "c", webhooks=hook), scheduler=turning)
    found = states(server)
    assert {name for name, one in found.items() if one.state != "ok" and not name.startswith("Disk")} == {"Backup"}
    assert "sqlite" in found["Store"].text or "postgres" in found["Store"].text
    assert found["Leases"].state == found["Webhook ops"].state == found["Live guards"].state == "ok"
    now = datetime.now(UTC)

    def plant(c: Connection) -> None:
        events.put(c, events.BACKUP, POLICY, {}, now - timedelta(days=3))
        leases.acquire(c, "cycle:x", "gone:1/lease", now=now - timedelta(hours=1), ttl_s=60)
        leases.acquire(c, "cycle:y", "here:1/lease", now=now, ttl_s=60)
        one = cycle(1, (CycleState.BUILDING, 0))
        cycles.insert(c, one)
        cycles.step(c, one.cycle_id, CycleStep(CycleState.FAILED, {"reason": f"{EVIL}\nmore"}, now))

    server.store.write(plant)
    turning.says = {"running": True, "error": "the store is away"}
    found = states(server)
    wrong = {name for name, one in found.items() if one.state != "ok" and not name.startswith("Disk")}
    assert wrong == {"Backup", "Lease cycle:x", "Cycle", "Scheduler"}
    assert "3 days ago" in found["Backup"].text
    assert "gone:1 has been silent for 59 min" in found["Lease cycle:x"].text
    assert found["Scheduler"] == Check(
        "Scheduler", "bad", "the store is away", found["Scheduler"].todo, "PairloopSchedulerTrouble"
    )
    assert worst(list(found.values())) == "bad"
    for one in found.values():
        assert one.state == "ok" or (one.todo and one.runbook in runbook()), one
    page = server.http.get("/system").text
    assert "Something is broken" in page
    assert EVIL not in page
    assert "PairloopLeaseStale" in page
    server.http.get("/v1/cycles/nope")
    assert ">not_found</code>" in server.http.get("/system").text.split('id="errors"')[1]
    context_of(server).draining = True
    assert states(server)["Server"].state == "bad"
    context_of(server).draining = False


class Away(Store):
    """A store whose database does not answer readers."""

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        yield from self._refuse()

    def _refuse(self) -> Iterator[Connection]:
        raise UnavailableError(f"no connection {EVIL}")


class WithEngines(FakePolicy):
    """Beside an engine server that is down, one that is ready, until it is not."""

    also_ready = True

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        down = ReplicaStatus("http://a:1", ReplicaState.DOWN, "open", 0, False, None, f"no answer {EVIL}")
        return (down, ReplicaStatus("http://b:1", ReplicaState.READY, "closed", 3, True, 0.0, ""))[: 1 + self.also_ready]


def test_engines_and_a_store_that_is_away_are_told(serve: Callable[..., RunningServer]) -> None:
    policy = WithEngines()
    server = serve(policy=policy)
    found = states(server)
    assert (found["Engine http://a:1"].state, found["Engine http://b:1"].state) == ("warn", "ok")
    policy.also_ready = False
    assert states(server)["Engine http://a:1"].state == "bad"
    away = copy(server.store)
    away.__class__ = Away
    context_of(server).store = away
    page = server.http.get("/system")
    context_of(server).store = server.store
    assert page.status_code == 200
    assert "it cannot be read" in page.text
    assert EVIL not in page.text
    assert "it cannot be read" not in server.http.get("/system").text


def test_the_doctor_reports_and_mends_nothing(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    assert "Not asked since" in server.http.get("/system").text
    assert server.http.get("/v1/doctor").json()["status"] == "never"
    pick(server, user_of(Pool.TRAIN), "question")
    dataset = compiled(server)
    assert server.http.post("/v1/doctor").json()["problems"] == []
    shutil.rmtree(dataset.path)
    for _ in range(2):
        found = server.http.post("/v1/doctor").json()
        assert (found["status"], [one["code"] for one in found["problems"]]) == ("done", ["missing_artifact"])
    page = server.http.get("/system").text
    assert "1 problem<" in page
    assert "missing_artifact" in page


def test_a_long_visit_is_one_visit_and_its_failure_is_told(tmp_path: Path) -> None:
    begun, leave = threading.Event(), threading.Event()
    visits = []

    def look(_: Store) -> Sequence[Problem]:
        visits.append(1)
        begun.set()
        assert leave.wait(10)
        if len(visits) > 1:
            raise StoreError("the network is away")
        return [Problem("orphan", "a row")]

    with World(tmp_path / "w") as world:
        doctor = Examination(look)
        first = doctor.begin(world.store)
        assert begun.wait(10)
        assert doctor.begin(world.store) is first
        assert doctor.finding.status == "running"
        leave.set()
        assert [one.code for one in first.result(10).problems] == ["orphan"]
        assert doctor.finding.problems
        again = doctor.begin(world.store).result(10)
        assert (again.status, again.error) == ("failed", "the network is away")
        broken = Examination(lambda _: [][0]).begin(world.store).result(10)  # a bug, say
        assert broken.status == "failed"


@pytest.mark.parametrize(("size", "words"), [(0, "0 B"), (999, "999 B"), (13_600_000, "13.6 MB"), (2.5e15, "2,500 TB")])
def test_sizes_as_people_say_them(size: float, words: str) -> None:
    assert size_words(size).replace("2.5e+03", "2,500") == words
