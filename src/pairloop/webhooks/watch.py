"""What no row tells of: a disk that fills up."""

from __future__ import annotations

import shutil
import socket
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic

from pairloop.config import Config
from pairloop.store import Store, events

LOOK_EVERY_S = 30.0
REARMED = 1.2
"""Times the limit that must be free again before the next fall is told."""


class DiskWatch:
    """Tells once when the free share of a disk falls below the limit, and again only after it had risen."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._policy = config.policy.name
        self._limit = config.webhooks.disk_low
        self._folders = {"state": config.state_dir, "artifacts": config.artifacts_dir}
        self._low: set[str] = set()
        self._looked_at = float("-inf")

    def look(self) -> None:
        """Look at the disks, every half a minute at most; raises what the store raises."""
        if monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = monotonic()
        for name, folder in self._folders.items():
            free = free_share(folder)
            if free is None or (name in self._low and free < REARMED * self._limit):
                continue
            self._low.discard(name)
            if free < self._limit:
                data = {"policy": self._policy, "host": socket.gethostname(), "folder": name, "free_share": round(free, 4)}
                data["limit"] = self._limit
                tell = partial(events.put, kind="disk.low", policy=self._policy, data=data, at=datetime.now(UTC))
                self._store.write(tell)
                self._low.add(name)


def free_share(folder: Path) -> float | None:
    """Free over total bytes of the disk that holds ``folder``; None where it cannot be told, as for a folder elsewhere."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free / usage.total
