"""Backs up or restores again and again, killed -9 at the n-th change of the file system, for every n: see test_backup.py.

``python dying_backup.py FOLDER backup|restore``. Forks instead of starting Python anew; this process itself stays without
threads. Prints one JSON line per n: what is there after the kill, and how the next try did.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tests.store_rows import a_group, a_version, contents_of, put_groups

from pairloop.config import Config
from pairloop.store import Store, backup, groups, keys, versions
from pairloop.store.archive import Archive, paths
from pairloop.store.restore import restore

WRITING = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.copytree", "shutil.copyfile")
"""Audit events of changes to the file system; opening a file for writing is one, too."""


def make_store(config: Config, name: str, skills: int) -> None:
    with Store.open(config) as store:
        put_groups(store, a_group(name))
        store.write(partial(versions.insert, version=a_version(0, path="/nowhere")))
        for number in range(1, skills + 1):
            with store.artifacts.stage() as folder:
                (folder / "adapter.safetensors").write_text(f"weights of {number}")
                made = store.artifacts.publish(folder, {})
            row = a_version(number, path=str(made.path), artifact_hash=made.hash)
            store.write(partial(versions.insert, version=row))


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


def burn(fuse: int) -> None:
    """Kill this process at its ``fuse``-th change of the file system; 0 never does."""
    left = fuse

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        is_write = event in WRITING or (event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax")
        left -= is_write
        if is_write and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if fuse:
        sys.addaudithook(hook)


class Backup:
    """One of two artifacts is in the folder already, the other one is to be copied; one older backup is to be removed."""

    def __init__(self, folder: Path) -> None:
        self._config = Config(state_dir=folder / "state")
        self.first = folder / "first"

    def prepare(self) -> None:
        make_store(self._config, "g", skills=2)
        self.live(self.first, 0)
        self.live(self.first, 0)

    def spoil(self, copy: Path) -> None:
        shutil.rmtree(next(path for path in sorted((copy / "artifacts").iterdir()) if len(path.name) == 32))

    def live(self, copy: Path, fuse: int) -> None:
        with Store.open(self._config) as store:
            burn(fuse)
            backup.take(store, copy, keep=2, actor="test")

    def tell(self, copy: Path) -> dict[str, Any]:
        before = [path.name for path in paths(self.first)]
        new = [path for path in paths(copy) if path.name not in before]
        problems = [problem for path in new for problem in Archive(path).problems()]
        self.live(copy, 0)
        whole = not any(Archive(path).problems() for path in paths(copy)) and not list(copy.glob(".[mp]*"))
        return {"done": len(new), "problems": problems, "is_next_whole": whole and len(paths(copy)) == 2}


class Restore:
    """Into a state directory with other data, by force."""

    def __init__(self, folder: Path) -> None:
        self._config = Config(state_dir=folder / "state")
        self._backups = folder / "backups"
        self.first = folder / "first"

    def prepare(self) -> None:
        make_store(self._config, "g", skills=2)
        lost, _ = keys.new("lost", [keys.Scope.ADMIN])
        with Store.open(self._config) as store:
            store.write(partial(keys.insert, key=lost))
            backup.take(store, self._backups, actor="test")
        make_store(Config(state_dir=self.first), "theirs", skills=1)
        with Store.open(Config(state_dir=self.first)) as store:
            store.write(partial(keys.insert, key=lost))
            store.write(lambda c: keys.revoke(c, lost.key_id, datetime.now(UTC), actor="test", reason="lost"))

    def spoil(self, copy: Path) -> None:
        pass

    def live(self, copy: Path, fuse: int) -> None:
        archive = Archive.find(self._backups)
        burn(fuse)
        restore(archive, Config(state_dir=copy), force=True, after=[self._after], actor="test")

    def _after(self, store: Store, _: Config) -> None:
        store.write(partial(groups.erase, group_ids=["g"]))

    def tell(self, copy: Path) -> dict[str, Any]:
        found = [self._rows(Config(state_dir=copy))]
        self.live(copy, 0)
        found.append(self._rows(Config(state_dir=copy)))
        return {"done": int(found[0] == "restored"), "problems": [], "is_next_whole": found[1] == "restored", "found": found}

    def _rows(self, config: Config) -> str:
        with Store.open(config) as store:
            rows = contents_of(store)
            with store.reading() as c:
                is_held = all(key.revoked_at is not None for key in keys.list_(c))
        names = [(row[0], row[4]) for row in rows["groups"]]  # the id and the prompt, which the last step erases
        known = {("theirs", 2): "theirs", ("g", 3): "restored"}
        is_erased = names[0][0] == "theirs" or names[0][1] == ""
        return known.get((names[0][0], len(rows["versions"])), "half") if len(names) == 1 and is_erased and is_held else "half"


def one_life(work: Backup | Restore, copy: Path, fuse: int) -> bool:
    shutil.copytree(work.first, copy)
    work.spoil(copy)
    code = in_child(partial(work.live, copy, fuse))
    assert code in (0, -signal.SIGKILL), code
    died = code != 0

    def tell() -> None:
        print(json.dumps({"fuse": fuse, "died": died, **work.tell(copy)}), flush=True)

    assert in_child(tell) == 0
    shutil.rmtree(copy)
    return died


def main(folder: str, what: str) -> None:
    kinds: dict[str, Callable[[Path], Backup | Restore]] = {"backup": Backup, "restore": Restore}
    work = kinds[what](Path(folder))
    assert in_child(work.prepare) == 0
    fuse = 1
    while one_life(work, Path(folder) / f"life-{fuse}", fuse):
        fuse += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
