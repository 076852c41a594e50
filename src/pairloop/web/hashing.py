"""Passwords are slow on purpose: however many are tried, they take no thread from anybody else, and 16 MB each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pairloop.errors import BusyError

AT_ONCE, WAITING = 2, 16
"""So many are hashed at a time, and so many wait: about two seconds' worth."""

Value = TypeVar("Value")


class Hashing:
    """Threads of their own for what hashes a password; may be used from any thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, "hashing")
        self._lock = threading.Lock()
        self._open = 0

    @property
    def is_full(self) -> bool:
        return self._open >= AT_ONCE + WAITING

    def submit(self, work: Callable[[], Value]) -> Future[Value]:
        """The result of ``work``, later. BusyError where too many wait."""
        with self._lock:
            if self.is_full:
                raise BusyError("too many passwords wait to be checked; try again in a moment")
            self._open += 1
        future = self._threads.submit(work)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: Future[Value]) -> None:
        with self._lock:
            self._open -= 1


HASHING = Hashing()
"""One for the process, whose processors they take."""
