"""Work that makes millions of small objects, done in a process of its own.

Here it would stop the server's threads for up to a second at a time (Python collects garbage in all of them at once), and the
memory of its largest moment would stay with the server. ADR 0025.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from pairloop.errors import PairloopError, SystemFailure, log_failure, place_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.2


def apart(work: Callable[[], T], should_stop: Callable[[], bool], *, doing: str) -> T | None:
    """What ``work`` gives, done by a process that ends with this one; None where ``should_stop`` said so first.

    ``work`` and what it gives are pickled: keep the latter small. What it raises of our own errors is raised here;
    SystemFailure where the process fails of anything else, or is killed. ``doing``: what it does, for that message.
    """
    context = multiprocessing.get_context("spawn")
    answers, answer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, answer, doing), name=doing, daemon=True)
    process.start()
    answer.close()
    try:
        while not answers.poll(POLL_S):
            if should_stop():
                return None
        found: T = _received(answers, process, doing)
        return found
    finally:
        answers.close()
        process.kill()
        process.join()


def _received(answers: Connection, process: SpawnProcess, doing: str) -> Any:
    try:
        found = answers.recv()
    except (EOFError, OSError) as error:
        process.join()
        raise SystemFailure(f"{doing}: the process that did it {_end_of(process.exitcode)}") from error
    if isinstance(found, Exception):
        raise found
    return found


def _end_of(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}, without an answer; its standard error says why"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (", as the system does where memory runs out" if name == "SIGKILL" else "")


def _child(work: Callable[[], object], answer: Connection, doing: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a service; the parent ends this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.disable()  # little of this is cyclic, and the process ends soon
    try:
        answer.send(work())
    except (PairloopError, OSError) as error:
        answer.send(error)
    except Exception as error:  # noqa: BLE001 - the supervisor line of this process; what it says may quote a message
        log_failure(logger, error, f"{doing}: failed")
        answer.send(SystemFailure(f"{doing}: {place_of(error)}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # also by kill -9: the system closes its end of a pipe
    os._exit(3)
