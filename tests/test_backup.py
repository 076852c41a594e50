"""Backup and restore: whole or absent, under load, over a kill, back into SQLite; every flipped bit is named."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy.engine import make_url
from tests.store_rows import BOT, NOW, a_group, a_pick, a_run, contents_of, put_groups, put_picks
from tests.test_doctor import artifact_of, prepared, store, upload

from pairloop.config import Config
from pairloop.errors import ConflictError, NotFoundError, StoreError
from pairloop.store import (
    Store,
    accounts,
    audit,
    backup,
    doctor,
    feedback,
    files,
    groups,
    jobs,
    keys,
    leases,
    reservations,
    runs,
    sessions,
    versions,
)
from pairloop.store.accounts import Role
from pairloop.store.archive import Archive, ArchivedFile, Manifest, paths
from pairloop.store.artifacts import sha256_of
from pairloop.store.database import alembic_config, writer_engine
from pairloop.store.jobs import Job, JobStatus
from pairloop.store.keys import Scope
from pairloop.store.reservations import ItemKind, Reservation
from pairloop.store.restore import restore
from pairloop.types import Alias

__all__ = ["prepared", "store"]  # the fixtures

REPOSITORY = Path(__file__).parents[1]


def rows_of(database: str | Path) -> list[str]:
    """The SQLite file, to the last column of its schema."""
    with closing(sqlite3.connect(database)) as raw:
        return list(raw.iterdump())


def only_sqlite(store: Store) -> None:
    if store.url.get_backend_name() != "sqlite":
        pytest.skip("about SQLite's file")


def restored(archive: Archive, folder: Path) -> Store:
    config = Config(state_dir=folder)
    assert restore(archive, config, actor="test").problems == []
    return Store.open(config)


def test_a_backup_restores_every_row_and_file(store: Store, tmp_path: Path) -> None:
    upload(store, b"rows")
    taken = backup.take(store, tmp_path / "backups", actor="test")
    assert (taken.copied, taken.found, taken.manifest.missing) == (3, 0, ())
    assert [path.name for path in paths(tmp_path / "backups")] == [taken.path.name]
    archive = Archive.find(tmp_path / "backups")
    assert archive.manifest == taken.manifest
    assert archive.problems() == []
    shutil.rmtree(artifact_of(store, "versions"))  # the backup stands on its own
    with restored(archive, tmp_path / "elsewhere") as copy:
        assert contents_of(copy) == contents_of(store)
        with copy.reading() as c:
            file = files.get(c, "file-1")
            assert versions.alias(c, BOT, Alias.CHAMPION) == 1
        assert file is not None
        assert Path(file.path).read_bytes() == b"rows"
        put_groups(copy, a_group("next"))
        put_picks(copy, a_pick("next"))
        with copy.reading() as c, store.reading() as original:
            assert feedback.max_seq(c, BOT) == feedback.max_seq(original, BOT) + 1


def test_the_next_backup_copies_only_what_is_new(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    backup.take(store, folder, actor="test")
    upload(store, b"rows")
    second = backup.take(store, folder, actor="test")
    assert (second.copied, second.found) == (1, 2)
    rotten = folder / "artifacts" / artifact_of(store, "versions").name / "adapter.safetensors"
    rotten.write_text("rotten")
    third = backup.take(store, folder, actor="test")
    assert (third.copied, third.found) == (1, 2), "what rots on the backup's disk is copied anew"
    assert rotten.read_text() == "adapter.safetensors"
    assert [problem for path in paths(folder) for problem in Archive(path).problems()] == []


def test_keep_removes_older_backups_and_what_they_alone_need(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    upload(store, b"rows")
    first = backup.take(store, folder, actor="test")
    store.write(partial(files.forget, file_ids=["file-1"], at=NOW))
    lone = artifact_of(store, "versions").name
    store.write(lambda c: c.exec_driver_sql("UPDATE versions SET kind = 'base', parent = NULL WHERE number = 1"))
    second = backup.take(store, folder, actor="test")
    assert (folder / "artifacts" / lone).exists()
    third = backup.take(store, folder, keep=2, actor="test")
    assert third.pruned == [first.path.name]
    assert paths(folder) == [second.path, third.path]
    assert not (folder / "artifacts" / lone).exists()
    assert not (folder / "artifacts" / "files" / "file-1").exists()
    assert Archive(second.path).problems() == Archive(third.path).problems() == []


def test_every_flipped_bit_is_named(store: Store, tmp_path: Path) -> None:
    upload(store, b"rows")
    taken, rng = backup.take(store, tmp_path / "backups", actor="test"), random.Random(0)
    ours = [path for path in (tmp_path / "backups").rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(ours) == 8  # database, manifest; two artifacts of two files, one of them with an empty one; an upload
    for path in (path for path in ours if path.stat().st_size):
        whole = path.read_bytes()
        for _ in range(5):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(StoreError, match=path.name):
                restore(Archive(taken.path), Config(state_dir=tmp_path / "elsewhere"), actor="test")
        path.unlink()
        with pytest.raises(StoreError, match=path.parent.name):
            restore(Archive(taken.path), Config(state_dir=tmp_path / "elsewhere"), actor="test")
        path.write_bytes(whole)
    assert not (tmp_path / "elsewhere").exists(), "nothing was restored"


def test_what_is_broken_in_the_store_is_named_and_stops_nothing(store: Store, tmp_path: Path) -> None:
    (artifact_of(store, "versions") / "adapter.safetensors").write_text("rotten")
    taken = backup.take(store, tmp_path / "backups", actor="test")
    (missing,) = taken.manifest.missing
    assert missing.startswith("version bot@1: ")
    assert "adapter.safetensors: was changed" in missing
    done = restore(Archive(taken.path), Config(state_dir=tmp_path / "elsewhere"), actor="test")
    assert {problem.code for problem in done.problems} == {"missing_artifact", "unusable_alias"}


def test_data_is_not_overwritten_and_force_moves_it_aside(store: Store, tmp_path: Path) -> None:
    only_sqlite(store)
    taken = backup.take(store, tmp_path / "backups", actor="test")
    config = Config(state_dir=tmp_path / "elsewhere")
    with Store.open(config) as other:
        put_groups(other, a_group("theirs"))
        archive = Archive(taken.path)
        for force in (False, True):
            with pytest.raises(ConflictError, match="a process has it open"):
                restore(archive, config, force=force, actor="test")
    before = rows_of(other.name)
    with pytest.raises(ConflictError, match="--force moves it aside"):
        restore(archive, config, actor="test")
    assert rows_of(other.name) == before
    done = restore(archive, config, force=True, actor="test")
    assert done.aside is not None
    assert rows_of(done.aside) == before
    with Store.open(config) as copy:
        assert contents_of(copy) == contents_of(store)
        with copy.reading() as c:
            assert [(one.action, one.actor) for one in audit.list_(c)] == [("restore", "test")]
    assert sorted(path.name for path in config.state_dir.iterdir()) == sorted(
        ["artifacts", "pairloop.sqlite", Path(done.aside).name]
    )


def test_a_damaged_database_is_moved_aside_too(store: Store, tmp_path: Path) -> None:
    only_sqlite(store)
    taken = backup.take(store, tmp_path / "backups", actor="test")
    config = Config(state_dir=tmp_path / "elsewhere")
    config.state_dir.mkdir()
    (config.state_dir / "pairloop.sqlite").write_bytes(b"what the disk left of it" * 100)
    done = restore(Archive(taken.path), config, force=True, actor="test")
    assert Path(str(done.aside)).read_bytes().startswith(b"what the disk left")
    assert done.problems == []


def test_cycles_and_jobs_go_on_at_once(store: Store, tmp_path: Path) -> None:
    upload(store, b"rows")
    until = datetime.now(UTC) + timedelta(hours=1)
    job = Job("job-1", JobStatus.RUNNING, BOT, BOT, 1, "file-1", {}, 0, NOW, owner="gone:1/job", lease_expires_at=until)
    store.write(partial(jobs.insert, job=job))
    store.write(partial(runs.insert, run=a_run()))
    store.write(partial(leases.acquire, name="cycle:bot", owner="gone:1/lease", now=datetime.now(UTC), ttl_s=3600.0))
    backup.take(store, tmp_path / "backups", actor="test")
    with restored(Archive.find(tmp_path / "backups"), tmp_path / "elsewhere") as copy:
        token = copy.write(partial(leases.acquire, name="cycle:bot", owner="new", now=datetime.now(UTC), ttl_s=60.0))
        assert token == 2, "the former owner is fenced off"
        with copy.reading() as c:
            (waiting,) = jobs.waiting(c, [JobStatus.QUEUED])
        assert (waiting.job_id, waiting.owner) == ("job-1", None)


def test_nobody_is_signed_in_and_nothing_is_held_after_a_restore(store: Store, tmp_path: Path) -> None:
    """Who logged out since the backup, or lost a machine, does not come back with it; nor does a hold of long ago."""
    account = store.write(partial(accounts.create, name="ada", role=Role.RATE, password_hash="x", actor="a", reason="r"))
    token = store.write(partial(sessions.begin, owner=account, address="198.51.100.7"))
    key, _ = keys.new("shop", [Scope.RATE])
    store.write(partial(keys.insert, key=key))
    store.write(partial(sessions.begin, owner=key, address="198.51.100.7"))
    put_groups(store, a_group("g-1"))
    later = datetime.now(UTC) + timedelta(hours=1)
    held = Reservation("res-1", BOT, "g-1", "ada", ItemKind.NEW, 0, NOW, later)
    store.write(partial(reservations.insert, reservation=held))
    taken = backup.take(store, tmp_path / "backups", actor="test")
    session_id, _ = sessions.split(token) or ("", "")
    with restored(Archive(taken.path), tmp_path / "elsewhere") as copy, copy.reading() as c:
        assert sessions.get(c, session_id) is None
        assert sessions.list_(c) == []
        assert reservations.get(c, "res-1") is None
        assert reservations.held(c, BOT, "ada", NOW) is None
        assert accounts.get(c, "ada") is not None  # who may come in is as it was, and signs in again
        assert keys.get(c, key.key_id) is not None
    with store.reading() as c:
        assert sessions.get(c, session_id) is not None, "the store that was backed up goes on"


def test_what_must_hold_after_a_restore_is_done_before_anybody_sees_it(store: Store, tmp_path: Path) -> None:
    taken = backup.take(store, tmp_path / "backups", actor="test")
    config = Config(state_dir=tmp_path / "elsewhere")

    def erase(copy: Store, target: Config) -> None:
        assert target is config
        assert not (config.state_dir / "pairloop.sqlite").exists()
        copy.write(partial(groups.erase, group_ids=["g"]))

    restore(Archive(taken.path), config, after=[erase], actor="test")
    with Store.open(config) as copy, copy.reading() as c:
        group = groups.get(c, "g")
    assert group is not None
    assert {one.text for one in group.completions} == {""}


def test_an_older_schema_is_migrated_and_a_newer_one_refused(store: Store, tmp_path: Path) -> None:
    taken = backup.take(store, tmp_path / "backups", actor="test")
    old = taken.path.parent / "2020"
    old.mkdir()
    engine = writer_engine(make_url(f"sqlite:///{old / 'database.sqlite'}"), "off")
    with engine.begin() as c:
        command.upgrade(alembic_config(c), "0004")
    engine.dispose()
    seal(taken.manifest, old, revision="0004")
    with restored(Archive(old), tmp_path / "migrated") as copy:
        put_groups(copy, a_group("next"))
    seal(taken.manifest, old, revision="9999")
    with pytest.raises(StoreError, match=r"'9999'.*upgrade pairloop"):
        restore(Archive(old), Config(state_dir=tmp_path / "newer"), actor="test")


def seal(like: Manifest, folder: Path, *, revision: str) -> None:
    """Write the manifest of an empty backup at another revision."""
    database = folder / "database.sqlite"
    entry = ArchivedFile(sha256_of(database), database.stat().st_size)
    manifest = replace(like, database=entry, revision=revision, artifacts={}, files={}, rows={})
    (folder / "manifest.json").write_text(manifest.as_text(), encoding="utf-8")


def test_one_backup_at_a_time(store: Store, tmp_path: Path) -> None:
    with backup._alone(tmp_path), pytest.raises(ConflictError, match="another backup"):
        backup.take(store, tmp_path, actor="test")
    with pytest.raises(NotFoundError, match="no backup"):
        Archive.find(tmp_path)


def test_picks_go_on_while_a_backup_is_taken_and_none_before_it_is_missing(store: Store, tmp_path: Path) -> None:
    # Pages for a dozen steps: a copy that is begun anew by each commit would never end.
    put_groups(store, *(a_group(f"long{number}", answers=("a" * 10**6, "b" * 10**6)) for number in range(6)))
    store.write(lambda c: [feedback.insert(c, a_pick(f"long{number}", feedback_id=f"of-{number}")) for number in range(6)])
    acknowledged: list[str] = []
    stop, enough = threading.Event(), threading.Event()

    def pick(rater: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            name = f"{rater}-{number}"
            group, row = a_group(name), a_pick(name, rater, feedback_id=f"pick-{name}")

            def write(c: object, group: object = group, row: object = row) -> None:
                groups.insert(c, group)  # type: ignore[arg-type]
                feedback.insert(c, row)  # type: ignore[arg-type]

            store.write(write)
            acknowledged.append(row.feedback_id)
            if len(acknowledged) >= 60:
                enough.set()

    threads = [threading.Thread(target=pick, args=(f"rater{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert enough.wait(30)
    before = list(acknowledged)
    try:
        taken = backup.take(store, tmp_path / "backups", actor="test")
        during = len(acknowledged)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert during > len(before), "nobody waited for the backup"
    with restored(Archive(taken.path), tmp_path / "elsewhere") as copy:
        with copy.reading() as c:
            there = set(c.exec_driver_sql("SELECT feedback_id FROM feedback").scalars())
            halves = c.exec_driver_sql(
                "SELECT count(*) FROM groups WHERE group_id NOT IN (SELECT group_id FROM feedback) OR "
                "(SELECT count(*) FROM completions WHERE completions.group_id = groups.group_id) != 2"
            ).scalar()
        assert set(before) <= there
        assert halves == 0
        assert doctor.check(copy) == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["backup", "restore"])
def test_killed_anywhere_it_is_absent_and_the_next_one_is_whole(what: str, tmp_path: Path) -> None:
    """A backup that is listed is whole; a store is the former one, or the restored one with its erasures."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "dying_backup.py"), str(tmp_path), what],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "src")])},
    )
    assert done.returncode == 0, done.stderr
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lives) > 10
    assert (lives[0]["died"], lives[0]["done"]) == (True, 0)
    assert (lives[-1]["died"], lives[-1]["done"]) == (False, 1)
    for life in lives:
        assert (life["problems"], life["is_next_whole"]) == ([], True), life
        assert "half" not in life.get("found", []), life
