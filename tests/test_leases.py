"""Leases under clocks that jump and stores that are away: who may write, and who finds out that it may no longer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from tests.loop_rig import Rig, open_rig, settings
from tests.test_jobs import a_job, stored
from tests.test_schedule import Watch, scheduling

from pairloop import faults
from pairloop.errors import ConflictError, UnavailableError
from pairloop.faults import Fault
from pairloop.loop import cycle
from pairloop.loop.cycle.context import CycleLease
from pairloop.loop.jobs.ownership import claim
from pairloop.store import Store, jobs, leases, schema, triggers
from pairloop.store.jobs import JobStatus
from pairloop.types import CycleState

ELSEWHERE = "another-host:1/lease_x"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path, schedule={"min_pairs": 0, "poll": "60s", "lease": "1m"})) as rig:
        yield rig


@pytest.fixture
def planted() -> Iterator[None]:
    yield
    faults.plant(None)


def shift(store: Store, **by: float) -> None:
    """The store's clock goes wrong by so much from now on."""
    right = store.clock
    store.clock = lambda c: right(c) + timedelta(**by)


def held_until(c: Connection, name: str) -> datetime:
    found = c.execute(sa.select(schema.leases).where(schema.leases.c.name == name)).one()
    until: datetime = found.expires_at
    return until


def test_a_clock_that_jumps_ahead_takes_a_lease_and_its_owner_can_no_longer_write(rig: Rig) -> None:
    with CycleLease(rig.loop) as lease, Store.open(rig.loop.config) as ahead:
        store = rig.store.fenced(lease.check)
        store.write(lambda c: triggers.put(c, "bot", "before", datetime.now(UTC)))
        shift(ahead, hours=1)
        with CycleLease(cycle.Loop(ahead, rig.policy, rig.loop.config, "another-host:1")):
            with pytest.raises(ConflictError, match="another process took it over; nothing was written"):
                store.write(lambda c: triggers.put(c, "bot", "after", datetime.now(UTC)))
            with rig.store.reading() as c:
                assert triggers.peek(c, "bot") == "before"
        with pytest.raises(ConflictError):  # also when nobody holds it any more: another one may have written meanwhile
            store.write(lambda c: triggers.put(c, "bot", "after", datetime.now(UTC)))


def test_a_clock_that_jumped_back_makes_no_lease_immortal(rig: Rig) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    rig.store.write(lambda c: leases.acquire(c, "cycle:bot", ELSEWHERE, now=tomorrow, ttl_s=60))
    with pytest.raises(ConflictError, match="another-host"):
        cycle.run(rig.loop, trigger="test")
    with rig.store.reading() as c:
        assert held_until(c, "cycle:bot") <= datetime.now(UTC) + timedelta(seconds=60)
    shift(rig.store, seconds=61)
    assert cycle.run(rig.loop, trigger="test").state is CycleState.NOTHING_TO_TRAIN


def test_a_job_whose_worker_is_silent_is_not_kept_from_others_by_a_clock(rig: Rig) -> None:
    job = a_job(rig.store, rig.loop.config)
    shift(rig.store, days=1)
    assert claim(rig.loop, ELSEWHERE, [JobStatus.VALIDATING]) is not None
    shift(rig.store, days=-1)
    assert claim(rig.loop, "another-host:2/trainer_y", [JobStatus.VALIDATING]) is None
    until = stored(rig.store, job).lease_expires_at
    assert until is not None
    assert until <= datetime.now(UTC) + timedelta(seconds=60)
    shift(rig.store, seconds=61)
    assert claim(rig.loop, "another-host:2/trainer_y", [JobStatus.VALIDATING]) is not None
    now = datetime.now(UTC)
    said = rig.store.write(lambda c: jobs.beat(c, job.job_id, ELSEWHERE, at=now, lease_expires_at=now))
    assert not said


def test_a_lost_lease_is_noticed_by_its_thread(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, schedule={"lease": "1s"})) as rig, CycleLease(rig.loop) as lease:
        rig.store.write(lambda c: leases.release(c, "cycle:bot", str(leases.holder(c, "cycle:bot"))))
        rig.store.write(lambda c: leases.acquire(c, "cycle:bot", ELSEWHERE, now=datetime.now(UTC), ttl_s=60))
        assert lease._lost.wait(20)
        assert lease.is_lost
        with pytest.raises(ConflictError, match="took it over"):
            lease.insist()


@pytest.mark.usefixtures("planted")
def test_a_full_disk_ends_no_cycle_and_the_scheduler_comes_back_to_it(rig: Rig) -> None:
    rig.serve(60)
    with scheduling(rig) as scheduler:
        faults.plant(Fault("artifact.before_rename", "full"))
        scheduler.trigger("by hand")
        assert Watch(rig).state(CycleState.DUELLING).number == 1


@pytest.mark.usefixtures("planted")
def test_a_store_that_is_full_is_told_as_such(rig: Rig) -> None:
    faults.plant(Fault("writer.before_commit", "full"))
    with pytest.raises(UnavailableError, match=r"nothing of this was stored: .*No space left on device"):
        rig.store.write(lambda c: triggers.put(c, "bot", "test", datetime.now(UTC)))
    with rig.store.reading() as c:
        assert triggers.peek(c, "bot") is None


@pytest.mark.usefixtures("planted")
def test_a_fault_happens_at_its_time_and_once(tmp_path: Path) -> None:
    latch, trace = tmp_path / "latch", tmp_path / "trace"
    fault = Fault("here", "broken", nth=2, once=str(latch), trace=str(trace))
    for happens in (True, False):  # as in a second process
        faults.plant(fault)
        faults.reach("here")
        faults.reach("there")
        if happens:
            with pytest.raises(OSError, match="here"):
                faults.reach("here")
        else:
            faults.reach("here")
    assert trace.read_text().split() == ["here", "there"] * 2
    faults.plant(Fault(faults.ANY, "full", nth=3))
    faults.reach("here")
    faults.reach("there")
    with pytest.raises(OSError, match="anywhere"):
        faults.reach("anywhere")
    faults.plant(None)
    faults.reach("here")
