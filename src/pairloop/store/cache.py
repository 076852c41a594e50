"""A bounded folder of copies that several processes share: what was unused for longest goes first, never what is in use.

An entry is a folder ``root/<name>`` or an uploaded file ``root/files/<name>``. Beside the root lie two lock files for each:
``.use`` is held (shared) by whoever reads, ``.fetch`` (alone) by whoever brings the entry here. Locks end with their process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

RECENT_S = 3_600.0
"""What was asked for so lately is being read, and stays."""
FILES = "files"
FILE_KEPT_S = 86_400.0
"""Copies of uploads go a day after their last use, room or not: their owners may have deleted them elsewhere."""


class Cache:
    """``held_most``: how many entries `hold` keeps for this process, the newest ones."""

    def __init__(self, root: Path, *, limit_bytes: int, held_most: int) -> None:
        self._root, self._locks = root, root.parent / "locks"
        self._limit, self._held_most = limit_bytes, held_most
        self._held: OrderedDict[str, IO[bytes]] = OrderedDict()
        self._guard = threading.Lock()
        self._locks.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Inside, the entry is not evicted, and it counts as just used."""
        with self._open(name, "use") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            os.utime(lock.fileno())
            yield

    @contextmanager
    def fetching(self, name: str) -> Iterator[None]:
        """Inside, nobody else brings the entry here."""
        with self._open(name, "fetch") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def hold(self, name: str) -> None:
        """Keep the entry from eviction until this process ends, or until ``held_most`` others were held after it."""
        with self._guard:
            if name not in self._held:
                lock = self._open(name, "use")
                fcntl.flock(lock, fcntl.LOCK_SH)
                self._held[name] = lock
            self._held.move_to_end(name)
            while len(self._held) > self._held_most:
                self._held.popitem(last=False)[1].close()

    def close(self) -> None:
        """Hold nothing any more; a second call does nothing."""
        with self._guard:
            while self._held:
                self._held.popitem()[1].close()

    def drop(self, name: str) -> None:
        """Take the entry away, whoever uses it: one that is broken, or that was deleted."""
        path = self._root / name
        if path.is_dir():
            self._remove(path)
        else:
            path.unlink(missing_ok=True)

    def evict(self) -> list[str]:
        """Remove the longest unused entries until the rest fits; the names of those that went."""
        found = sorted((self._used_at(name), name, size) for name, size in self._entries())
        total, now, gone = sum(size for _, _, size in found), time.time(), list[str]()
        for used_at, name, size in found:
            is_old_file = name.startswith(f"{FILES}/") and now - used_at > FILE_KEPT_S
            if (total > self._limit or is_old_file) and self._evict(name):
                gone.append(name)
                total -= size
        return gone

    def _evict(self, name: str) -> bool:
        """False where somebody uses the entry, or did so lately."""
        with self._open(name, "use") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if time.time() - self._used_at(name) < RECENT_S:
                return False
            self.drop(name)
        return True

    def _remove(self, folder: Path) -> None:
        """At once for whoever looks, and then file by file."""
        aside = Path(tempfile.mkdtemp(prefix="evicted-", dir=self._root / "tmp"))
        with suppress(FileNotFoundError):  # another process was quicker
            folder.rename(aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)

    def _entries(self) -> list[tuple[str, int]]:
        """Name and size in bytes of everything that is here."""
        folders = [path for path in self._root.iterdir() if path.is_dir() and path.name not in ("tmp", FILES)]
        files = sorted((self._root / FILES).glob("*"))
        return [(path.name, sum(_size(file) for file in path.rglob("*"))) for path in folders] + [
            (f"{FILES}/{path.name}", _size(path)) for path in files
        ]

    def _used_at(self, name: str) -> float:
        """When somebody asked for the entry, or it was written."""
        return max(_changed_at(self._lock_file(name, "use")), _changed_at(self._root / name))

    def _lock_file(self, name: str, what: str) -> Path:
        return self._locks / f"{name.replace('/', '-')}.{what}"

    def _open(self, name: str, what: str) -> IO[bytes]:
        # Lock files stay: one that is unlinked and made again would be two locks. They are empty.
        return self._lock_file(name, what).open("ab")


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # another process evicts too
        return 0
