"""Waiting for what another thread or process does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 30.0


def until(what: Callable[[], Any]) -> Any:
    """What ``what`` gives once it gives something true; AssertionError after `PATIENCE_S`."""
    end, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not (found := what()):
        assert time.monotonic() < end, f"not seen within {PATIENCE_S:g} s"
        pause.wait(0.01)
    return found
