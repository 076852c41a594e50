"""The queue of fine-tuning jobs: one thread validates them, another trains them, one at a time and in turn with cycles."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pairloop.config import duration_s
from pairloop.errors import log_failure
from pairloop.loop.cycle import Loop, is_gone
from pairloop.loop.jobs.ownership import is_silent
from pairloop.loop.jobs.validate import validate_next
from pairloop.loop.jobs.work import discard, train_next
from pairloop.store import cycles, jobs, leases, runs
from pairloop.types import CycleState

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 300.0


class _Worker:
    """A thread that does one thing again and again, waits where there is nothing to do, and outlives what goes wrong."""

    def __init__(self, name: str, act: Callable[[], bool], poll_s: float) -> None:
        self._act, self._poll_s = act, poll_s
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.trouble: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def notify(self) -> None:
        self._wake.set()

    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                done = self._act()
                failures, self.trouble = 0, None
            except Exception as error:  # noqa: BLE001 - the supervisor: the queue outlives whatever a job ran into
                log_failure(logger, error, "a fine-tuning job broke")
                done, failures, self.trouble = False, failures + 1, f"{type(error).__name__}: {error}"
                self._stopping.wait(min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(failures - 1, 20)))
            if not done:
                self._wake.wait(self._poll_s)
                self._wake.clear()


class JobQueue:
    """Both threads. ``start`` and ``stop`` may be called once each, ``notify`` from any thread."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._had_a_job = False
        poll_s = duration_s(loop.config.schedule.poll)
        self._trainer = _Worker("jobs-trainer", self._train, poll_s)
        self._validator = _Worker("jobs-validator", self._validate, poll_s)

    def start(self) -> None:
        for worker in (self._validator, self._trainer):
            worker.start()

    def stop(self) -> None:
        """Stop a training at its next step (it goes on from there at the next start), and wait for the threads."""
        for worker in (self._validator, self._trainer):
            worker.stop()
        for worker in (self._validator, self._trainer):
            worker.join()

    def notify(self) -> None:
        """A job was created, cancelled or resumed."""
        for worker in (self._validator, self._trainer):
            worker.notify()

    @property
    def trouble(self) -> str | None:
        """What last went wrong in one of the threads."""
        return self._trainer.trouble or self._validator.trouble

    def _validate(self) -> bool:
        done = validate_next(self._loop, self._validator.is_stopping)
        if done:
            self._trainer.notify()
        return done

    def _train(self) -> bool:
        self._clean_up()
        if self._had_a_job and _a_cycle_waits(self._loop):
            return False  # in turn: it takes the machine within a moment
        self._had_a_job = train_next(self._loop, self._trainer.is_stopping)
        return self._had_a_job

    def _clean_up(self) -> None:
        """Remove what is left here of jobs that have ended and that no worker has: checkpoints may fill a disk."""
        for folder in self._loop.config.runs_dir.glob("ftjob-*"):
            with self._loop.store.reading() as c:
                job, now = jobs.get(c, folder.name), self._loop.store.clock(c)
            if job is not None and job.status.is_terminal and (job.owner is None or is_silent(job, now)):
                discard(self._loop, job)


def _a_cycle_waits(loop: Loop) -> bool:
    """True while a cycle of this policy, held by a living process, has its data and has not begun to train."""
    with loop.store.reading() as c:
        current = cycles.current(c, loop.name)
        holder = leases.holder(c, f"cycle:{loop.name}")
        begun = current is not None and runs.for_cycle(c, current.cycle_id) is not None
    waits = current is not None and current.state is CycleState.TRAINING and not begun
    return waits and holder is not None and not is_gone(holder)
