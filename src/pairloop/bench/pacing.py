"""A contestant's side of the race: it waits for its turn, and reports what the turn cost. No torch.

One JSON line each way: ``{"steps": n}`` comes in, the turn's figures go out; the end of the input ends the contestant.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

MB = 1 << 20


class Pacer:
    """Measures a contestant's steps. ``peak``: bytes held at most since `ready`, where the device counts them itself.

    ``synchronize``: waits until the device has done what it was given; ``rest``: gives back what others may need meanwhile.
    """

    def __init__(self, commands: IO[str], replies: IO[str]) -> None:
        self.synchronize: Callable[[], None] = lambda: None
        self.rest: Callable[[], None] = lambda: None
        self.peak: Callable[[], int] | None = None
        self._commands = commands
        self._replies = replies
        self._before = 0
        self._left = 0
        self._units = 0
        self._cpu_s = self._wall_s = 0.0

    def ready(self, **facts: Any) -> bool:
        """Before the first step: report ``facts``, forget earlier peaks, wait for the first turn; False where there is none."""
        self._before = _status("VmRSS")
        forget_peak()
        self._reply(facts)
        return self._wait()

    def step(self, units: float) -> bool:
        """After a step of so many units: go on, or report and wait where the turn is over; False once there is no other."""
        self._units += int(units)
        self._left -= 1
        if self._left:
            return True
        self.synchronize()
        wall_s, cpu_s = time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s
        self.rest()
        peak, before = (self.peak(), 0) if self.peak else (_status("VmHWM"), self._before)
        self._reply(
            {
                "units": self._units,
                "cpu_s": cpu_s,
                "wall_s": wall_s,
                "peak_mb": round(peak / MB, 1),
                "net_mb": round((peak - before) / MB, 1),
            }
        )
        return self._wait()

    def fail(self, message: str) -> None:
        """Report why there will be no turn."""
        self._reply({"error": message})

    def _wait(self) -> bool:
        line = self._commands.readline()
        if not line:
            return False
        self._left, self._units = int(json.loads(line)["steps"]), 0
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()
        return True

    def _reply(self, facts: dict[str, Any]) -> None:
        self._replies.write(json.dumps(facts) + "\n")
        self._replies.flush()


def forget_peak() -> None:
    """Let the kernel count this process's peak memory from here on; where it cannot, the peak is that of its whole life."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(field: str) -> int:
    """Bytes of a line of the process's status: VmRSS as it is, VmHWM its peak."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Without a proc file system the life's peak is all there is.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
