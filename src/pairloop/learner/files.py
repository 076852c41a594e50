"""Files that are whole or absent, and the lock that keeps two children out of one run. No torch."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pairloop import faults


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of ``target`` to write into; flushed and renamed to ``target`` at the end, removed on an error."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        faults.reach("folder.before_rename")
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        faults.reach("folder.after_rename")
        flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """fsync of a file's content or a folder's entries."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """True where a process has the lock file ``path``, see `exclusive`."""
    if sys.platform == "win32" or not path.exists():
        return False
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, waiting for it; the system frees it when its holder dies, however it dies."""
    with path.open("a") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
