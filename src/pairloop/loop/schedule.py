"""When cycles start: every N hours, by cron, at M new pairs, by hand, or any mix. One thread, one cycle at a time.

The settings are the file's, with what an operator has set in the store laid over it (``store.schedules``): read at every look.

Fine-tuning jobs have a queue of their own (``jobs.JobQueue``), and so has the watch over live answers (``deploy.Watch``); both
start and stop with this thread: a duel is looked at while a job trains, and a broken version goes while a cycle does.

The thread wakes when it is told that something happened (``notify``) and at every poll. It begins a cycle that is due, goes on
with one that was interrupted, and looks at the duel when picks came or its time is over. What falls due meanwhile is kept
as the one pending trigger. The lease that makes a cycle the only one is ``cycle.run``'s own.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from pairloop.config import ScheduleSection, duration_s
from pairloop.errors import ConflictError, PairloopError, UnavailableError, log_failure
from pairloop.loop import cycle as cycle_stage
from pairloop.loop import deploy, pairs, privacy
from pairloop.loop.cycle import Loop
from pairloop.loop.jobs import JobQueue
from pairloop.store import canaries, cycles, duels, schedules, triggers, versions
from pairloop.types import BASE_VERSION, Cycle, CycleState, Duel, DuelKind

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 30.0
LONGEST_RETRY_S = 3_600.0
FIRST_RETURN_S = 1.0
"""After so long a store that was away or full is tried again, each time twice as long, up to ``LONGEST_RETURN_S``."""
LONGEST_RETURN_S = 60.0
LOOK_REST = 4.0
"""Seconds of rest per second spent on a look, up to ``LONGEST_REST_S``."""
LONGEST_REST_S = 1.0
LOOK_EVERY_S = 0.25
"""The least time between two looks at the store: picks come by the hundred, and a look at a duel reads them all."""
COUNT_EVERY_S = 1.0
"""The least time between two counts of new pairs, which read all new picks."""
SWEEP_EVERY_S = 3_600.0
"""How often texts that are old enough are looked for."""
_FRUITLESS = (CycleState.FAILED, CycleState.NOTHING_TO_TRAIN)


def due(
    section: ScheduleSection,
    *,
    now: datetime,
    last_started_at: datetime,
    new_pairs: int,
    pending: str | None,
    hold_until: datetime | None = None,
    retry: bool = False,
) -> str | None:
    """Why a cycle starts now, or None. ``last_started_at``: of the last cycle, or when the policy was registered.

    A pending trigger goes first. After fruitless cycles nothing else starts one before ``hold_until``; then ``retry`` says that
    the last one failed and is to be tried again.
    """
    if pending is not None:
        return pending
    if not section.enabled or (hold_until is not None and now < hold_until):
        return None
    if retry:
        return "trying again after a failure"
    if section.min_pairs and new_pairs >= section.min_pairs:
        return f"{new_pairs} new pairs (min_pairs = {section.min_pairs})"
    clock = cycle_stage.next_run_at(section, last_started_at, now)
    if clock is not None and clock <= now:
        settings = [f"{key} = {value}" for key, value in (("every", section.every), ("cron", section.cron)) if value]
        return f"the clock ({', '.join(settings)})"
    return None


def backoff(recent: list[Cycle]) -> datetime | None:
    """Until when the clock and new pairs start nothing: 30 s after a fruitless cycle, twice as long after each further one.

    ``recent``: cycles that ended, newest first. Without this a cycle that fails, or finds nothing to train, would start again
    at once, for what started it is still there.
    """
    streak = 0
    while streak < len(recent) and recent[streak].state in _FRUITLESS:
        streak += 1
    if streak == 0:
        return None
    wait_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** (streak - 1))
    return recent[0].steps[-1].created_at + timedelta(seconds=wait_s)


@dataclass(frozen=True, slots=True)
class _Look:
    """What was last seen of a duel; another look is worth its while when this changed."""

    duel_id: str
    picks: int


class Scheduler:
    """Turns the loop in a thread of its own. ``start`` and ``stop`` may be called once each; the rest from any thread."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._poll_s = duration_s(loop.config.schedule.poll)
        self._wake = threading.Condition()
        self._woken = False
        self._stopping = threading.Event()
        self._seen: _Look | None = None
        self._unloader = cycle_stage.Unloader(loop.store, loop.policy, loop.config)
        self._trouble: str | None = None
        self._new_pairs = (float("-inf"), 0)
        self._counted: int | None = None
        self._looked_at: datetime | None = None
        self._recount = False
        self._swept_at = float("-inf")
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._jobs = JobQueue(loop) if loop.config.schedule.jobs else None
        self._watch = deploy.Watch(loop.store, loop.policy, loop.config, on_alarm=self.notify)

    def start(self) -> None:
        self._thread.start()
        self._watch.start()
        if self._jobs is not None:
            self._jobs.start()

    def stop(self) -> None:
        """Stop a training run at its next step (it goes on from there at the next start), and wait for the thread."""
        self._stopping.set()
        self.notify()
        self._watch.stop()
        if self._jobs is not None:
            self._jobs.stop()
        if self._thread.ident is not None:
            self._thread.join()

    def notify(self) -> None:
        """Something happened (a pick, a trigger): look now instead of at the next poll."""
        with self._wake:
            self._woken = True
            self._wake.notify()
        if self._jobs is not None:
            self._jobs.notify()

    def trigger(self, reason: str) -> None:
        """Start a cycle now, or keep it as the one pending trigger while another one is on."""
        loop = self._loop
        loop.store.write(lambda c: triggers.put(c, loop.name, reason, datetime.now(UTC)))
        self.notify()

    def status(self) -> dict[str, Any]:
        """Whether the thread runs, what last went wrong in it, when it last looked, and the new pairs that it counted then."""
        return {
            "running": self._thread.is_alive() and not self._stopping.is_set(),
            "error": self._trouble or self._watch.trouble or (self._jobs.trouble if self._jobs is not None else None),
            "looked_at": None if self._looked_at is None else self._looked_at.isoformat(),
            "new_pairs": self._counted,
        }

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._tick()
                failures, self._trouble, self._looked_at = 0, None, datetime.now(UTC)
                wait_s = min(self._poll_s, COUNT_EVERY_S) if self._recount else self._poll_s
            except ConflictError as error:  # another process turns this loop; its turn will end
                logger.info("%s", error)
                wait_s = self._poll_s
            except UnavailableError as error:  # says nothing about the cycle, which goes on when the store is back
                logger.warning("the store is not to be had: %s", error)
                self._trouble, self._seen = f"{type(error).__name__}: {error}", None
                wait_s = min(LONGEST_RETURN_S, FIRST_RETURN_S * 2.0 ** min(failures, 20))
                failures += 1
            except Exception as error:  # noqa: BLE001 - the supervisor: the loop outlives whatever a cycle ran into
                log_failure(logger, error, "the cycle broke")
                self._trouble, self._seen = f"{type(error).__name__}: {error}", None
                if not self._stopping.is_set():  # what stops may fail of that, and goes on at the next start
                    self._record(error)
                wait_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(failures, 20))
                failures += 1
            # A look at a duel reads all its picks: looking must not take the time that answering needs.
            spent_s = time.monotonic() - began
            self._stopping.wait(min(max(LOOK_EVERY_S, LOOK_REST * spent_s), LONGEST_REST_S))
            self._sleep(wait_s, patient=failures > 0)

    def _record(self, error: Exception) -> None:
        try:
            cycle_stage.record_failure(self._loop, error)
        except Exception as problem:  # noqa: BLE001 - the store itself may be what is broken; the cycle is then resumed later
            log_failure(logger, problem, "the failure could not be recorded")

    def _sleep(self, wait_s: float, *, patient: bool) -> None:
        """Until notified or for ``wait_s``; ``patient`` after an error: only ``stop`` cuts that short."""
        if patient:
            self._stopping.wait(wait_s)
            return
        with self._wake:
            self._wake.wait_for(lambda: self._woken or self._stopping.is_set(), timeout=wait_s)
            self._woken = False

    def _tick(self) -> None:
        """Move the open cycle if there is something to do, or begin one if it is due."""
        loop, self._recount = self._loop, False
        self._sweep()
        with loop.store.reading() as c:
            current = cycles.current(c, loop.name)
        self._unloader.look()  # another process may have ended one: the command line, a worker
        if current is None:
            reason = self._due()
            if reason is not None:
                self._turn(reason, current)
        elif not current.state.is_waiting:
            self._turn(current.trigger, current)
        else:
            self._keep_trigger()
            if self._worth_a_look(current):
                self._turn(current.trigger, current)

    def _sweep(self) -> None:
        """Retention, between cycles: what is due goes in small batches. A cycle does not fail of it."""
        if time.monotonic() - self._swept_at < SWEEP_EVERY_S:
            return
        self._swept_at = time.monotonic()
        try:
            swept = privacy.sweep(self._loop.store, self._loop.config)
        except (PairloopError, OSError) as error:
            logger.error("retention: %s; tried again in an hour", error)
            return
        if not swept.is_empty:
            logger.info("retention: %d groups, datasets %s, versions %s", swept.groups, swept.datasets, swept.versions)

    def _turn(self, reason: str, current: Cycle | None) -> None:
        done = cycle_stage.run(
            self._loop, trigger=reason, should_stop=self._stopping.is_set, only=None if current is None else current.cycle_id
        )
        logger.info("cycle %d of %s is %s", done.number, self._loop.name, done.state)
        self._new_pairs = (float("-inf"), 0)
        if current is None or len(done.steps) > len(current.steps):  # one that waits for a canary's end did not move
            self.notify()  # a trigger may have been kept meanwhile

    def _due(self) -> str | None:
        with self._loop.store.reading() as c:
            section = schedules.current(c, self._loop.config).section
        return self._due_by(section)

    def _due_by(self, section: ScheduleSection) -> str | None:
        loop, now = self._loop, datetime.now(UTC)
        with loop.store.reading() as c:
            recent = cycles.list_(c, loop.name, limit=16)
            base = versions.get(c, loop.name, BASE_VERSION)
            pending = triggers.peek(c, loop.name)
        if base is None:
            return None
        ended = [cycle for cycle in recent if cycle.state.is_terminal]
        return due(
            section,
            now=now,
            last_started_at=recent[0].created_at if recent else base.created_at,
            new_pairs=self._count_new(section),
            pending=pending,
            hold_until=backoff(ended),
            retry=bool(ended) and ended[0].state is CycleState.FAILED,
        )

    def _keep_trigger(self) -> None:
        """What falls due during a duel waits for its end, as the one pending trigger."""
        loop = self._loop
        with loop.store.reading() as c:
            section = schedules.current(c, loop.config).section
        reason = self._due_by(section)
        if reason is not None:

            def keep(c: Connection) -> None:
                is_as_then = schedules.current(c, loop.config).section == section
                if is_as_then and triggers.peek(c, loop.name) is None:
                    triggers.put(c, loop.name, reason, datetime.now(UTC), is_asked=False)

            loop.store.write(keep)

    def _worth_a_look(self, current: Cycle) -> bool:
        """New picks since the last look, a duel or canary that was closed, whose time is over, or on which a guard broke."""
        loop = self._loop
        with loop.store.reading() as c:
            opened, canary = duels.opened(c, loop.name), canaries.current(c, loop.name)
            duel, counts = opened.get(DuelKind.GATE), duels.counts_of_picks(c, [one.duel_id for one in opened.values()])
            look = None if duel is None else _Look(duel.duel_id, sum(counts.values()))
        changed, self._seen = look != self._seen, look
        if changed or self._watch.alarm:
            return True
        if current.state is CycleState.CANARY:
            return canary is None
        return duel is None or _is_over(duel, loop.config.gate.max_hours)

    def _count_new(self, section: ScheduleSection) -> int:
        """New pairs, as of a moment ago; where that count is kept, ``_recount`` has the thread come back for a new one."""
        if not section.min_pairs:
            return 0
        counted_at, found = self._new_pairs
        self._recount = time.monotonic() - counted_at < COUNT_EVERY_S
        if not self._recount:
            found = pairs.count_new(self._loop.store, self._loop.config)
            self._new_pairs, self._counted = (time.monotonic(), found), found
        return found


def _is_over(duel: Duel, max_hours: float) -> bool:
    return datetime.now(UTC) - duel.opened_at >= timedelta(hours=max_hours)
