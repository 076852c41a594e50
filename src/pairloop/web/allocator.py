"""How the C library keeps memory for the threads of a server."""

from __future__ import annotations

import ctypes
import sys

ARENAS = 2
"""glibc makes one for each thread, up to eight a processor, and what one thread frees another cannot use: what each of them
once needed adds up. Python's own lock lets one of our threads allocate at a time, SQLite aside."""
_M_ARENA_MAX = -8  # malloc.h


def share_arenas() -> None:
    """Let threads that are started from now on share ``ARENAS``; does nothing where the C library is another one."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_ARENA_MAX, ARENAS)
