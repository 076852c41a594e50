"""The machine: disks, the database's size, what this program is."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric

from pairloop import __version__
from pairloop.config import Config
from pairloop.errors import StoreError
from pairloop.metrics.families import Live, gauge, gauges
from pairloop.store import Store
from pairloop.store.database import size_bytes, sqlite_memory_bytes


class Machine(Live):
    """Gauges of what the process stands on."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._folders = {"state": config.state_dir, "artifacts": config.artifacts_dir}

    def read(self) -> Iterable[Metric]:
        disks = {name: usage for name, folder in self._folders.items() if (usage := _disk(folder)) is not None}
        free = {name: float(free) for name, (free, _) in disks.items()}
        shares = {name: free / total for name, (free, total) in disks.items()}
        yield gauges("disk_free_bytes", "Free bytes of the disk that holds the folder", "folder", free)
        yield gauges("disk_free_ratio", "Free share of the disk that holds the folder", "folder", shares)
        yield from self._database()
        memory = sqlite_memory_bytes() if self._store.url.get_backend_name() == "sqlite" else None
        text = "Memory of this process that SQLite holds, most of it the writer's pages (64 MB when full)"
        yield gauge("sqlite_memory_bytes", text, memory)
        build = GaugeMetricFamily("pairloop_build_info", "1, with the versions", labels=["version", "python"])
        build.add_metric([__version__, platform.python_version()], 1)
        yield build

    def _database(self) -> Iterable[Metric]:
        size, is_up = None, 1.0
        try:
            with self._store.reading() as c:
                size = size_bytes(c)
        except StoreError:
            is_up = 0.0
        yield gauge("store_up", "1 where the database could be read just now; without it other families are missing", is_up)
        yield gauge("database_bytes", "Size of the database", size)


def _disk(folder: Path) -> tuple[int, int] | None:
    """Free and total bytes of the disk under a folder; None where there is no such folder here."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free, usage.total
