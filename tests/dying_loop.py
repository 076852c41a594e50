"""Runs one cycle again and again, killed -9 at its n-th write for every n, and resumed in a new process: see test_cycle.py.

``python dying_loop.py CONFIG.json FOLDER``: FOLDER holds a prepared state directory, copied for each n. Forks
instead of starting Python anew; this process itself stays without threads. Prints one JSON line per n.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from pairloop.config import Config, parse_config
from pairloop.loop import cycle
from pairloop.policy.fake import FakePolicy
from pairloop.store import Store, cycles, doctor, versions

T = TypeVar("T")


class DyingStore(Store):
    """Kills its own process right before its n-th awaited write: all that led to it is done, and it is not recorded."""

    fuse = 0

    def write(self, fn: Callable[[Connection], T]) -> T:
        self.fuse -= 1
        if self.fuse == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(fn)


def live(config: Config, fuse: int) -> None:
    """Turn the loop until the cycle ended, or until the fuse burnt down; 0 never burns."""
    with DyingStore.open(config) as store:
        assert isinstance(store, DyingStore)
        policy = FakePolicy(7)
        cycle.ensure_base(store, policy, config)
        with store.reading() as c:
            ended = any(one.state.is_terminal for one in cycles.list_(c, config.policy.name))
        store.fuse = fuse
        if not ended:
            cycle.run(cycle.Loop(store, policy, config, f"{socket.gethostname()}:{os.getpid()}"), trigger="test")
        policy.close()


def tell(config: Config, *, died: bool, fuse: int) -> None:
    """What the store says after the second life."""
    with Store.open(config) as store, store.reading() as c:
        line = {
            "fuse": fuse,
            "died": died,
            "cycles": [[str(step.state) for step in one.steps] for one in cycles.list_(c, config.policy.name)],
            "versions": len(versions.list_(c, config.policy.name)),
            "moves": [move.action for move in versions.promotions(c, config.policy.name)],
            "problems": [problem.text for problem in doctor.check(store)],
        }
    print(json.dumps(line), flush=True)


def in_child(act: Callable[[], None]) -> int:
    """Run ``act`` in a forked process; its exit status, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def resume_and_tell(config: Config, *, died: bool, fuse: int) -> None:
    live(config, 0)
    tell(config, died=died, fuse=fuse)


def main(config_json: str, prepared: str) -> None:
    died, fuse = True, 0
    while died:
        fuse += 1
        folder = Path(prepared).with_name(f"life-{fuse}")
        shutil.copytree(prepared, folder)
        config = parse_config({**json.loads(config_json), "state_dir": folder})
        code = in_child(partial(live, config, fuse))
        assert code in (0, -signal.SIGKILL), code
        died = code != 0
        assert in_child(partial(resume_and_tell, config, died=died, fuse=fuse)) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
