"""Labelled fault points: the places where a crash would hurt most. Tests make the crash happen; production walks through.

``reach("artifact.before_rename")`` stands where the process may die. It costs one comparison, unless a fault was planned: by
`plant`, or for a new process by the environment (`ENVIRONMENT`, JSON of a `Fault`). ADR 0018; tests/test_faults.py visits
every label that stands in the source.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

from pairloop.config import planned_fault

ENVIRONMENT = "PAIRLOOP_FAULT"
ANY = "*"


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens when a label is reached for the ``nth`` time in a process; ``at`` may be `ANY` of them.

    ``kill``: SIGKILL to this process. ``stop``: SIGSTOP. ``full``: the OSError of a full disk. ``broken``: of a broken one.
    ``once``: a file that is made when it happens; where it is there already, nothing happens, in whichever process.
    ``trace``: a file to which each process appends the labels that it reaches.
    """

    at: str = ""
    do: Literal["kill", "stop", "full", "broken"] = "kill"
    nth: int = 1
    once: str | None = None
    trace: str | None = None

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class _Plan:
    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._lock = threading.Lock()
        self._reached: Counter[str] = Counter()

    def reach(self, label: str) -> None:
        fault = self._fault
        with self._lock:
            self._reached[label] += 1
            if self._reached[label] == 1 and fault.trace is not None:
                _append(fault.trace, label)
            found = self._reached.total() if fault.at == ANY else self._reached[label]
            happens = fault.at in (ANY, label) and found == fault.nth and (fault.once is None or _first(fault.once))
        if happens:
            _happen(fault, label)


_plan: _Plan | None = None


def plant(fault: Fault | None) -> None:
    """Plan a fault in this process from now on, or with None no longer."""
    global _plan
    _plan = None if fault is None else _Plan(fault)


def reach(label: str) -> None:
    """Nothing, unless a fault was planned for this label."""
    if _plan is not None:
        _plan.reach(label)


def _happen(fault: Fault, label: str) -> None:
    if fault.do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.do == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        code = errno.ENOSPC if fault.do == "full" else errno.EIO
        raise OSError(code, os.strerror(code), label)


def _append(path: str, label: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{label}\n".encode())
    finally:
        os.close(descriptor)


def _first(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


if planned := planned_fault(ENVIRONMENT):
    plant(Fault(**json.loads(planned)))
