"""When cycles start: the pure rules, and the thread that follows them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests import waiting
from tests.loop_rig import Rig, better, open_rig, settings
from tests.test_deploy import add_version

from pairloop.config import ScheduleSection
from pairloop.errors import UnavailableError
from pairloop.loop import cycle, deploy, schedule
from pairloop.loop.cycle.context import CycleLease
from pairloop.loop.jobs import queue
from pairloop.loop.schedule import Scheduler, backoff, due
from pairloop.policy.fake import FakePolicy
from pairloop.store import cycles, runs, triggers
from pairloop.types import Cycle, CycleState, CycleStep, RunStatus, Version

T0 = datetime(2026, 1, 5, 8, tzinfo=UTC)
NOTHING = ScheduleSection(min_pairs=0)


def asked(
    section: ScheduleSection,
    *,
    after: timedelta = timedelta(0),
    new_pairs: int = 0,
    pending: str | None = None,
    hold_until: datetime | None = None,
    retry: bool = False,
) -> str | None:
    return due(
        section,
        now=T0 + after,
        last_started_at=T0,
        new_pairs=new_pairs,
        pending=pending,
        hold_until=hold_until,
        retry=retry,
    )


def test_every() -> None:
    section = ScheduleSection(every="6h", min_pairs=0)
    assert asked(section, after=timedelta(hours=5, minutes=59)) is None
    assert asked(section, after=timedelta(hours=6)) == "the clock (every = 6h)"
    assert asked(section, after=timedelta(days=3)) is not None


def test_cron_is_in_utc_and_fires_once_per_time() -> None:
    section = ScheduleSection(cron="30 9 * * *", min_pairs=0)
    assert asked(section, after=timedelta(hours=1, minutes=29)) is None
    assert asked(section, after=timedelta(hours=1, minutes=30)) == "the clock (cron = 30 9 * * *)"
    begun = T0 + timedelta(hours=1, minutes=30)
    later = due(section, now=begun + timedelta(hours=2), last_started_at=begun, new_pairs=0, pending=None)
    assert later is None


def test_new_pairs() -> None:
    section = ScheduleSection(min_pairs=500)
    assert asked(section, new_pairs=499) is None
    assert asked(section, new_pairs=512) == "512 new pairs (min_pairs = 500)"
    assert asked(NOTHING, new_pairs=10_000, after=timedelta(days=9)) is None


def test_the_first_of_any_mix() -> None:
    section = ScheduleSection(every="6h", cron="0 9 * * *", min_pairs=100)
    assert asked(section, after=timedelta(minutes=59), new_pairs=99) is None
    assert "new pairs" in (asked(section, after=timedelta(minutes=59), new_pairs=100) or "")
    assert "clock" in (asked(section, after=timedelta(minutes=60), new_pairs=0) or "")
    assert cycle.next_run_at(section, T0, T0) == T0 + timedelta(hours=1)
    assert cycle.next_run_at(ScheduleSection(every="10m", cron="0 9 * * *"), T0, T0) == T0 + timedelta(minutes=10)
    assert cycle.next_run_at(NOTHING, T0, T0) is None


def test_a_pending_trigger_goes_first_whatever_else_holds() -> None:
    assert asked(NOTHING, pending="by hand") == "by hand"
    off = ScheduleSection(enabled=False, min_pairs=1)
    assert asked(off, new_pairs=5) is None
    assert asked(off, pending="by hand") == "by hand"
    assert asked(NOTHING, pending="by hand", hold_until=T0 + timedelta(hours=1)) == "by hand"


def test_after_fruitless_cycles_the_clock_waits() -> None:
    section = ScheduleSection(min_pairs=1)
    hold = T0 + timedelta(seconds=30)
    assert asked(section, new_pairs=9, hold_until=hold, retry=True) is None
    assert (
        asked(section, new_pairs=0, hold_until=hold, retry=True, after=timedelta(seconds=30)) == "trying again after a failure"
    )
    assert asked(section, new_pairs=0, hold_until=hold, after=timedelta(seconds=30)) is None


def ended(state: CycleState, number: int = 1) -> Cycle:
    return Cycle(f"cycle_{number}", "bot", number, 0, "test", T0, (CycleStep(state, {}, T0),))


def test_backoff_doubles_up_to_an_hour() -> None:
    failed, held, nothing = (ended(s) for s in (CycleState.FAILED, CycleState.HELD, CycleState.NOTHING_TO_TRAIN))
    assert backoff([]) is None
    assert backoff([held, failed]) is None
    assert backoff([failed, held]) == T0 + timedelta(seconds=30)
    assert backoff([failed, nothing, failed, held]) == T0 + timedelta(seconds=120)
    assert backoff([failed] * 16) == T0 + timedelta(hours=1)


# --- the thread


@contextmanager
def scheduling(rig: Rig, loop: cycle.Loop | None = None) -> Iterator[Scheduler]:
    scheduler = Scheduler(loop or rig.loop)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.stop()


class Watch:
    """Waits for something the scheduler writes, on a condition instead of a sleep."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def until(self, what: Callable[[Cycle | None], bool]) -> Cycle | None:
        def newest() -> Cycle | None:
            with self._rig.store.reading() as c:
                return next(iter(cycles.list_(c, "bot", limit=1)), None)

        return waiting.until(lambda: (one,) if what(one := newest()) else None, why=newest)[0]

    def state(self, *wanted: CycleState, number: int = 1) -> Cycle:
        found = self.until(lambda one: one is not None and one.number == number and one.state in wanted)
        assert found is not None
        return found


def test_picks_start_a_cycle_and_decide_its_duel(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, schedule={"poll": "60s"})) as rig, scheduling(rig) as scheduler:
        watch = Watch(rig)
        scheduler.notify()
        rig.serve(60)
        scheduler.notify()
        duelling = watch.state(CycleState.DUELLING)
        assert "new pairs (min_pairs = 30)" in duelling.trigger
        duel = rig.duel
        for _ in range(15):
            rig.judge(20, better, duel=duel)  # the scheduler may end it at any time
            scheduler.notify()
            if watch.until(lambda one: one is not None).state.is_terminal:  # type: ignore[union-attr]
                break
        assert watch.state(CycleState.PROMOTED, CycleState.HELD).state is CycleState.PROMOTED
        assert scheduler.status().items() >= {"running": True, "error": None}.items()
    assert scheduler.status()["running"] is False


def test_a_trigger_starts_a_cycle_and_during_a_duel_it_waits(tmp_path: Path) -> None:
    config = settings(tmp_path, schedule={"poll": "60s", "min_pairs": 0}, gate={"max_picks": 60})
    with open_rig(config) as rig, scheduling(rig) as scheduler:
        watch = Watch(rig)
        rig.serve(60)
        scheduler.trigger("by hand")
        assert watch.state(CycleState.DUELLING).trigger == "by hand"
        scheduler.trigger("by hand again")
        with rig.store.reading() as c:
            assert triggers.peek(c, "bot") == "by hand again"
        rig.judge(60)
        scheduler.notify()
        assert watch.until(lambda one: one is not None and one.number == 2).trigger == "by hand again"  # type: ignore[union-attr]


def test_what_falls_due_during_a_duel_is_kept(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, schedule={"poll": "60s"})) as rig, scheduling(rig) as scheduler:
        watch = Watch(rig)
        rig.serve(60)
        scheduler.notify()
        watch.state(CycleState.DUELLING)
        rig.serve(60)
        scheduler.notify()

        def kept(_: Cycle | None) -> bool:
            scheduler.notify()
            with rig.store.reading() as c:
                return triggers.peek(c, "bot") is not None

        watch.until(kept)


def test_the_deadline_ends_a_duel_without_picks(tmp_path: Path) -> None:
    config = settings(tmp_path, schedule={"poll": "100s"}, gate={"max_hours": 1 / 3600})
    with open_rig(config) as rig, scheduling(rig) as scheduler:
        rig.serve(60)
        scheduler.notify()
        watch = Watch(rig)

        def over(one: Cycle | None) -> bool:
            scheduler.notify()
            return one is not None and one.state is CycleState.HELD

        watch.until(over)


def test_a_cycle_that_was_interrupted_goes_on_at_the_start(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path)) as rig:
        rig.serve(60)
        answers = iter([False, True])
        assert cycle.run(rig.loop, trigger="test", should_stop=lambda: next(answers)).state is CycleState.TRAINING
        with scheduling(rig):
            assert Watch(rig).state(CycleState.DUELLING).trigger == "test"


def test_stopping_in_the_middle_of_training_is_prompt_and_loses_nothing(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path)) as rig:
        rig.serve(60)
        watch = Watch(rig)
        scheduler = Scheduler(rig.loop)
        scheduler.start()

        def training(one: Cycle | None) -> bool:
            with rig.store.reading() as c:
                return one is not None and runs.for_cycle(c, one.cycle_id) is not None

        watch.until(training)
        scheduler.stop()
        stopped = watch.until(lambda one: one is not None)
        assert stopped is not None
        if stopped.state is CycleState.TRAINING:  # the child may have been quicker
            with rig.store.reading() as c:
                run = runs.for_cycle(c, stopped.cycle_id)
            assert run is not None
            assert run.status is RunStatus.RUNNING
        assert not stopped.state.is_terminal
        with scheduling(rig):
            assert watch.state(CycleState.DUELLING).cycle_id == stopped.cycle_id


def test_a_failed_cycle_is_not_started_again_at_once(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, train={"min_pairs": 1_000})) as rig, scheduling(rig) as scheduler:
        rig.serve(60)
        scheduler.notify()
        watch = Watch(rig)
        watch.state(CycleState.NOTHING_TO_TRAIN)
        rig.serve(60)
        for _ in range(20):
            scheduler.notify()
            threading.Event().wait(0.05)
        with rig.store.reading() as c:
            assert len(cycles.list_(c, "bot")) == 1
        scheduler.trigger("by hand")
        watch.state(CycleState.NOTHING_TO_TRAIN, number=2)


def test_another_process_that_turns_the_loop_is_left_in_peace(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path)) as rig:
        rig.serve(60)
        with CycleLease(rig.loop), scheduling(rig) as scheduler:
            for _ in range(10):
                scheduler.notify()
                threading.Event().wait(0.05)
            assert scheduler.status()["error"] is None
            with rig.store.reading() as c:
                assert cycles.list_(c, "bot") == []


class Explosive(FakePolicy):
    """An engine with a bug in it."""

    def load(self, version: object) -> None:  # noqa: ARG002
        raise ZeroDivisionError("a bug in the engine")


def test_an_error_nobody_foresaw_is_recorded_and_the_thread_lives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_rig(settings(tmp_path)) as rig:
        rig.serve(60)
        loop = cycle.Loop(rig.store, Explosive(), rig.loop.config, "tester:1")
        with scheduling(rig, loop) as scheduler:
            failed = Watch(rig).state(CycleState.FAILED)
            assert failed.steps[-1].record["error"].startswith("ZeroDivisionError (test_schedule.py:")
            assert failed.steps[-1].record["stage"] == "checking"
            Watch(rig).until(lambda _: scheduler.status()["error"] is not None)
            assert scheduler.status()["running"] is True
        assert "the cycle broke" in caplog.text
        loop.policy.close()


class ExplodesWhenTold(FakePolicy):
    """Its bug shows while the loop stops."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.told = threading.Event(), threading.Event()

    def load(self, version: Version) -> None:  # noqa: ARG002
        self.reached.set()
        self.told.wait()
        raise ZeroDivisionError("a bug in the engine")


def test_an_error_that_comes_while_stopping_leaves_the_cycle_to_the_next_start(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path)) as rig:
        rig.serve(60)
        policy = ExplodesWhenTold()
        with scheduling(rig, cycle.Loop(rig.store, policy, rig.loop.config, "tester:1")) as scheduler:
            assert policy.reached.wait(60)
            stopping = threading.Thread(target=scheduler.stop)
            stopping.start()
            Watch(rig).until(lambda _: not scheduler.status()["running"])
            policy.told.set()
            stopping.join()
        with rig.store.reading() as c:
            assert cycles.list_(c, "bot")[0].state is CycleState.CHECKING
        policy.close()
        assert cycle.run(rig.loop, trigger="test").state is CycleState.DUELLING


def test_a_cycle_that_waits_for_the_end_of_a_canary_is_left_alone_until_the_next_poll(tmp_path: Path) -> None:
    woken, slept = list[bool](), threading.Event()

    class Sleeps(Scheduler):
        def _sleep(self, wait_s: float, *, patient: bool) -> None:  # noqa: ARG002
            woken.append(self._woken)
            slept.set()
            self._stopping.wait()

    with open_rig(settings(tmp_path)) as rig:
        for number in (1, 2):
            add_version(rig, number)
        deploy.start_canary(rig.store, rig.policy, rig.loop.config, number=1, share=0.2, reason="try it")
        records: dict[CycleState, dict[str, Any]] = {
            CycleState.BUILDING: {},
            CycleState.TRAINING: {"dataset_id": "gone"},
            CycleState.CHECKING: {"version": 2},
        }
        steps = tuple(CycleStep(state, record, T0) for state, record in records.items())
        rig.store.write(lambda c: cycles.insert(c, Cycle("cycle_1", "bot", 1, 0, "test", T0, steps)))
        scheduler = Sleeps(rig.loop)
        scheduler._thread.start()
        try:
            assert slept.wait(20)
        finally:
            scheduler.stop()
        assert woken == [False]
        with rig.store.reading() as c:
            assert cycles.list_(c, "bot")[0].state is CycleState.CHECKING
        assert scheduler.status()["error"] is None


MANY = 1_100
"""Failures in a row, one after the other: more than a float can be doubled."""


@pytest.mark.parametrize("error", [UnavailableError, ValueError])
def test_the_thread_outlives_many_failures_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    for name in ("FIRST_RETURN_S", "FIRST_RETRY_S", "LOOK_EVERY_S", "LONGEST_REST_S"):
        monkeypatch.setattr(schedule, name, 0.0)
    monkeypatch.setattr(logging.getLogger("pairloop.loop.schedule"), "disabled", True)
    failed, reached = count(1), threading.Event()

    class FailsAlways(Scheduler):
        def _tick(self) -> None:
            if next(failed) > MANY:
                reached.set()
                self._stopping.wait()
            raise error("again")

        def _record(self, error: Exception) -> None:
            """There is no cycle."""

    with open_rig(settings(tmp_path)) as rig:
        scheduler = FailsAlways(rig.loop)
        scheduler._thread.start()
        try:
            assert reached.wait(20)
        finally:
            scheduler.stop()


def test_the_jobs_thread_outlives_many_failures_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "FIRST_RETRY_S", 0.0)
    monkeypatch.setattr(logging.getLogger("pairloop.loop.jobs.queue"), "disabled", True)
    failed, reached = count(1), threading.Event()

    def fail() -> bool:
        if next(failed) > MANY:
            reached.set()
        raise ValueError("a bug")

    worker = queue._Worker("jobs-test", fail, 0.0)
    worker.start()
    try:
        assert reached.wait(20)
    finally:
        worker.stop()
        worker.join()


def test_a_scheduler_that_was_never_started_can_be_stopped(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path)) as rig:
        Scheduler(rig.loop).stop()
