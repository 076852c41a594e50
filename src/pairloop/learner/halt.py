"""SIGTERM is put off while a run trains, so that it can write a checkpoint first. No torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def put_off_sigterm() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM is only noted; gives a function that says whether it came. At the end it takes its course.

    Outside the main thread, where Python hears no signals, it never comes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)
