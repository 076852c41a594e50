"""Lives that keep what is there: a backup, a restore, and artifacts at a URL that two machines share."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from tests.dying_backup import make_store
from tests.faults_rig import SCENARIOS, Scenario
from tests.store_rows import NOW, a_version

from pairloop.config import Config
from pairloop.errors import StoreError
from pairloop.store import Artifact, Store, backup, doctor, files, groups, keys, versions
from pairloop.store.archive import Archive, paths
from pairloop.store.checkpoints import FarCheckpoints
from pairloop.store.files import FileStatus, Purpose, StoredFile
from pairloop.store.keys import Key, Scope
from pairloop.store.remote import RemoteArtifacts
from pairloop.store.restore import restore

# --- a backup


def state_of(folder: Path) -> Config:
    return Config(state_dir=folder / "state")


def _upload(store: Store) -> None:
    path, size, sha256 = store.artifacts.keep_file("file-1", BytesIO(b"rows"), limit=10)
    row = StoredFile("file-1", "rows.jsonl", Purpose.FINE_TUNE, size, sha256, str(path), FileStatus.PROCESSED, None, NOW)
    store.write(partial(files.insert, file=row))


def _prepare_backup(folder: Path) -> None:
    """An older backup holds one artifact; another one and an upload have come since."""
    make_store(state_of(folder), "g", skills=1)
    take(folder)
    with Store.open(state_of(folder)) as store:
        _upload(store)
        with store.artifacts.stage() as staged:
            (staged / "adapter.safetensors").write_text("weights of 2")
            made = store.artifacts.publish(staged, {})
        store.write(partial(versions.insert, version=a_version(2, path=str(made.path), artifact_hash=made.hash)))


def take(folder: Path, keep: int = 1) -> backup.Taken:
    with Store.open(state_of(folder)) as store:
        return backup.take(store, folder / "backups", keep=keep, actor="test")


def _live_backup(folder: Path) -> None:
    take(folder)


def _tell_backup(folder: Path) -> dict[str, Any]:
    (newest,) = (Archive(path) for path in paths(folder / "backups"))
    made = newest.manifest
    with Store.open(state_of(folder)) as store:
        problems = [problem.text for problem in doctor.check(store)]
    return {
        "broken": newest.problems(),
        "holds": (len(made.artifacts), sorted(made.files), made.missing, made.rows["groups"], made.rows["versions"]),
        "left": sorted(path.name for path in (folder / "backups").glob(".[mp]*")),
        "problems": problems,
    }


def broken_backups(folder: Path) -> list[str]:
    """Right after a death: one is listed, and each that is listed is whole."""
    listed = paths(folder / "backups")
    return ["no backup is left"] * (not listed) + [problem for path in listed for problem in Archive(path).problems()]


# --- a restore

LOST = Key("lost", "lost", "hash", frozenset(Scope), None, NOW)
"""Revoked since the backup."""


def _prepare_restore(folder: Path) -> None:
    make_store(Config(state_dir=folder / "source"), "g", skills=1)
    with Store.open(Config(state_dir=folder / "source")) as store:
        _upload(store)
        store.write(partial(keys.insert, key=LOST))
        backup.take(store, folder / "backups", actor="test")
    make_store(state_of(folder), "theirs", skills=1)
    with Store.open(state_of(folder)) as store:
        store.write(partial(keys.insert, key=LOST))
        store.write(lambda c: keys.revoke(c, LOST.key_id, NOW, actor="test", reason="lost"))


def _live_restore(folder: Path) -> None:
    restore(Archive.find(folder / "backups"), state_of(folder), force=True, after=[_erase], actor="test")


def _erase(store: Store, _: Config) -> None:
    """What was erased since the backup."""
    store.write(partial(groups.erase, group_ids=["g"]))


def _group_in(database: Path) -> str:
    with closing(sqlite3.connect(database)) as raw:
        found = [
            f"{group_id}{'' if 'hello' in prompt else ', erased'}"
            for group_id, prompt in raw.execute("SELECT group_id, CAST(prompt AS TEXT) FROM groups")
        ]
        found += [f"a good {name}" for (name,) in raw.execute("SELECT name FROM keys WHERE revoked_at IS NULL")]
    return " and ".join(found)


def _tell_restore(folder: Path) -> dict[str, Any]:
    state = folder / "state"
    with Store.open(state_of(folder)) as store:
        problems = [problem.text for problem in doctor.check(store)]
    return {
        "here": _group_in(state / "pairloop.sqlite"),
        "aside": "theirs" in {_group_in(path) for path in state.glob("pairloop.sqlite.before-restore-*Z")},
        "left": sorted(path.name for path in state.glob("*.restoring*")),
        "problems": problems,
    }


def broken_restore(folder: Path) -> list[str]:
    """Right after a death: the former database, or the restored one with what was erased and revoked since, never both."""
    database = folder / "state" / "pairloop.sqlite"
    found = _group_in(database) if database.exists() else "no database"
    return [] if found in ("theirs", "g, erased") else [found]


# --- artifacts at a URL

WEIGHTS = {"weights/a.bin": "12345", "weights/b.bin": "678", "config.json": "{}"}


def machine(folder: Path, name: str) -> RemoteArtifacts:
    """One machine's view of the URL; its own folder holds the copies."""
    root, url = folder / name / "cache" / "artifacts", f"local://{folder}/url"
    return RemoteArtifacts(root, url, {"auto_mkdir": True}, limit_bytes=10**9)


def publish(artifacts: RemoteArtifacts) -> Artifact:
    with artifacts.stage() as folder:
        for name, text in WEIGHTS.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return artifacts.publish(folder, {"noun": "version"})


def _nothing(folder: Path) -> None:
    (folder / "url").mkdir()


def _live_remote(folder: Path) -> None:
    """One machine publishes, takes an upload and trains two checkpoints long; another one reads all that."""
    here, there = machine(folder, "a"), machine(folder, "b")
    made = publish(here)
    upload, _, _ = here.keep_file("file-1", BytesIO(b"rows"), limit=10)
    there.local(there.path(made.hash))
    there.local(there.root / upload.relative_to(here.root))
    for step in (2, 4):
        with here.stage() as staged:
            for name in ("weights", "state"):
                (staged / name).write_text(f"{name} after {step}")
            checkpoints_of(here).put(step, staged)
    (folder / "b" / "resumed").mkdir(exist_ok=True)
    checkpoints_of(there).fetch(4, folder / "b" / "resumed")


def checkpoints_of(artifacts: RemoteArtifacts) -> FarCheckpoints:
    found = artifacts.checkpoints("run_1")
    assert found is not None
    return found


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def _tell_remote(folder: Path) -> dict[str, Any]:
    far = machine(folder, "c")
    names = sorted(path.name for path in (folder / "url").iterdir())
    for name in names:
        if name not in ("files", "checkpoints"):
            far.inspect(name, deep=True)
    return {
        "resumed": contents(folder / "b" / "resumed"),
        "at the URL": contents(folder / "url"),
        "a": _kept(folder / "a"),
        "b": _kept(folder / "b"),
        "left": [url.rsplit("/url/", 1)[1] for url in (*far.leftovers(older_than_s=-1.0), *far.sharing_runs().values())],
    }


def _kept(machine_folder: Path) -> dict[str, str]:
    return {
        name: text for name, text in contents(machine_folder / "cache" / "artifacts").items() if not name.startswith("tmp/")
    }


def broken_remote(folder: Path) -> list[str]:
    """Right after a death: for a machine that has nothing yet, each artifact at the URL is whole or absent; here, too."""
    far, found = machine(folder, f"d-{len(list(folder.iterdir()))}"), list[str]()
    for path in (folder / "url").iterdir():
        if path.name == "checkpoints":
            found += _broken_checkpoint(far, folder / f"{far.root.parent.parent.name}-resumed")
        elif path.name == "files":
            found += [f"{file}: cut" for file in path.iterdir() if file.read_bytes() != b"rows"]
        elif far.is_whole(path.name):
            far.verify(path.name)
        else:
            with suppress(StoreError):
                found.append(f"{far.local(far.root / path.name)}: is read, and was never published")
    for name in ("a", "b"):
        root = machine(folder, name).root
        here = [path for path in root.iterdir() if path.name not in ("tmp", "files")]
        found += [str(path) for path in here if not super(RemoteArtifacts, machine(folder, name)).is_whole(path.name)]
    return found


def _broken_checkpoint(far: RemoteArtifacts, target: Path) -> list[str]:
    """Once there was a whole one there always is, and the newest is never an older step's."""
    step = checkpoints_of(far).newest()
    uploaded = sorted((far.root.parents[2] / "url" / "checkpoints" / "run_1").iterdir())
    if step is None:
        return [] if [path.name for path in uploaded] == ["step-00000002"] else ["no checkpoint is whole"]
    target.mkdir()
    checkpoints_of(far).fetch(step, target)
    return [] if contents(target) == {name: f"{name} after {step}" for name in ("weights", "state")} else [f"{target}: cut"]


SCENARIOS["backup"] = Scenario(None, _prepare_backup, _live_backup, _tell_backup, broken_backups)
SCENARIOS["restore"] = Scenario(None, _prepare_restore, _live_restore, _tell_restore, broken_restore)
SCENARIOS["remote"] = Scenario(None, _nothing, _live_remote, _tell_remote, broken_remote)
