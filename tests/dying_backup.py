"""Takes a backup again and again, killed -9 at the n-th thing it does to the file system, for every n: see test_backup.py.

``python dying_backup.py FOLDER``. Forks instead of starting Python anew; this process itself stays without threads. Prints one
JSON line per n: backups listed before and after, what is wrong with them, and how the next backup did.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.dying_loop import in_child
from tests.store_rows import a_group, a_version, put_groups

from pairloop.config import Config
from pairloop.store import Store, backup, versions
from pairloop.store.archive import Archive, paths

WRITING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copytree", "shutil.copyfile")
"""Audit events of changes to the file system; opening files for writing is one, too."""


def prepare(config: Config) -> None:
    with Store.open(config) as store:
        put_groups(store, a_group("g"))
        store.write(partial(versions.insert, version=a_version(0, path="/nowhere")))
        for number in (1, 2):
            with store.artifacts.stage() as folder:
                (folder / "adapter.safetensors").write_text(f"weights of {number}")
                made = store.artifacts.publish(folder, {})
            row = a_version(number, path=str(made.path), artifact_hash=made.hash)
            store.write(partial(versions.insert, version=row))


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


def live(config: Config, folder: Path, fuse: int) -> None:
    with Store.open(config) as store:
        burn(fuse)
        backup.take(store, folder, keep=2)


def tell(config: Config, folder: Path, *, died: bool, fuse: int, before: list[str]) -> None:
    listed = [path.name for path in paths(folder)]
    problems = [problem for path in paths(folder) if path.name not in before for problem in Archive(path).problems()]
    with Store.open(config) as store:
        again = backup.take(store, folder, keep=2)
    whole = all(not Archive(path).problems() for path in paths(folder)) and not list(folder.glob(".[mp]*"))
    line = {
        "fuse": fuse,
        "died": died,
        "new": sorted(set(listed) - set(before)),
        "problems": problems,
        "is_next_whole": whole and again.path in paths(folder) and len(paths(folder)) <= 2,
    }
    print(json.dumps(line), flush=True)


def main(folder: str) -> None:
    config = Config(state_dir=Path(folder) / "state")
    assert in_child(partial(prepare, config)) == 0
    first = Path(folder) / "backups-0"
    assert in_child(partial(live, config, first, 0)) == 0
    assert in_child(partial(live, config, first, 0)) == 0
    died, fuse = True, 0
    while died:
        fuse += 1
        copy = Path(folder) / f"backups-{fuse}"
        shutil.copytree(first, copy)
        lost = next(path for path in sorted((copy / "artifacts").iterdir()) if len(path.name) == 32)
        shutil.rmtree(lost)  # so that each life has something to copy
        before = [path.name for path in paths(copy)]
        code = in_child(partial(live, config, copy, fuse))
        assert code in (0, -signal.SIGKILL), code
        died = code != 0
        assert in_child(partial(tell, config, copy, died=died, fuse=fuse, before=before)) == 0
        shutil.rmtree(copy)


if __name__ == "__main__":
    main(*sys.argv[1:])
