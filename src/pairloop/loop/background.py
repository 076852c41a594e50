"""What is done now and then beside the work: heartbeats, leases, uploads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(act: Callable[[], None], *, every_s: float, name: str) -> Iterator[None]:
    """A thread that does ``act`` each ``every_s`` seconds while the block runs; one that is begun is waited for.

    ``act`` is to keep its errors to itself: the thread ends with one.
    """
    done = threading.Event()

    def work() -> None:
        while not done.wait(every_s):
            act()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
