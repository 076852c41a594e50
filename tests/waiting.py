"""Waiting for what another thread or process does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal, TypeVar

PATIENCE_S = 30.0
"""For what takes no time by itself: a busy machine may take this long to come to it."""

T = TypeVar("T")


def until(
    what: Callable[[], T | Literal[False] | None], *, patience_s: float = PATIENCE_S, why: Callable[[], object] = lambda: ""
) -> T:
    """What ``what`` gives once it gives something true; AssertionError with what ``why`` gives after ``patience_s``."""
    end, pause = time.monotonic() + patience_s, threading.Event()
    while not (found := what()):
        assert time.monotonic() < end, f"not seen within {patience_s:g} s {why()}"
        pause.wait(0.01)
    return found
