"""How long a request spent sampling, so that what the rest of the server adds can be told from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter


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
