"""How long a request took, and how much of that was sampling, so that what the rest of the server adds can be told from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from time import perf_counter

from pairloop.types import Completion

Answers = tuple[Completion, ...]


def ms_between(start: float, end: float) -> int:
    """Whole milliseconds between two looks at `perf_counter`."""
    return round(1000 * (end - start))


class Took:
    """How long each answer of a request took since ``came_at``; ``ended`` is told of each in any thread.

    Perhaps too late: an answer is there before its callbacks run, and whoever looks then takes the time of the look.
    """

    def __init__(self, came_at: float) -> None:
        self._came_at = came_at
        self._ends: dict[int, float] = {}

    def ended(self, answer: Future[Answers]) -> None:
        self._ends[id(answer)] = perf_counter()

    def noted(self, answers: Iterable[tuple[Future[Answers], Answers]]) -> Answers:
        """All completions, each with the time that its own took; those that were sampled as one ended as one."""
        now = perf_counter()
        return tuple(
            replace(completion, total_ms=ms_between(self._came_at, self._ends.get(id(answer), now)))
            for answer, completions in answers
            for completion in completions
        )


class Stopwatch:
    """Runs while anything is being sampled; seconds."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since = 0.0
        self._running = 0
        self.has_run = False
        """Whether anything was sampled at all."""

    def start(self) -> None:
        self.has_run = True
        if not self._running:
            self._since = perf_counter()
        self._running += 1

    def stop(self) -> None:
        self._running -= 1
        if not self._running:
            self._spent += perf_counter() - self._since

    @property
    def seconds(self) -> float:
        """So far; of a stream that is still being sampled too."""
        return self._spent + (perf_counter() - self._since if self._running else 0.0)


_CURRENT: ContextVar[Stopwatch | None] = ContextVar("sampling", default=None)


def watch() -> Stopwatch:
    """A new stopwatch for the request that this context, and the tasks that begin in it, belong to."""
    stopwatch = Stopwatch()
    _CURRENT.set(stopwatch)
    return stopwatch


@contextmanager
def sampling() -> Iterator[None]:
    """Time spent in here is the sampler's, not ours."""
    stopwatch = _CURRENT.get()
    if stopwatch is None:
        yield
        return
    stopwatch.start()
    try:
        yield
    finally:
        stopwatch.stop()
