"""Backups of PostgreSQL, and the way from SQLite to PostgreSQL and back, on a server that the test starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.loop_rig import open_rig, settings
from tests.postgres import missing, running_server
from tests.store_rows import a_group, a_pick, contents_of, put_groups, put_picks

from pairloop import faults
from pairloop.config import load_config
from pairloop.faults import Fault
from pairloop.loop import cycle
from pairloop.store import Store, backup, doctor, feedback, keys, repair
from pairloop.store.archive import Archive
from pairloop.store.restore import restore
from pairloop.store.versions import promotions
from pairloop.types import CycleState


@pytest.fixture
def url() -> Iterator[str]:
    with running_server() as server:
        yield server.blank()


@pytest.mark.postgres
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_store_grows_from_sqlite_into_postgres_and_back(url: str, tmp_path: Path) -> None:
    """Three stores with the same rows; the loop goes on in the second one."""
    first = settings(tmp_path / "first", store={"database": f"sqlite:///{tmp_path / 'first.sqlite'}"})
    with open_rig(first) as rig:
        rig.serve(60)
        assert cycle.run(rig.loop, trigger="test").state is CycleState.DUELLING
        before = contents_of(rig.store)
        backup.take(rig.store, tmp_path / "backups", actor="test")
    second = settings(tmp_path / "second", store={"database": url})
    assert restore(Archive.find(tmp_path / "backups"), second, actor="test").problems == []
    with open_rig(second, seed=1) as rig:
        assert contents_of(rig.store) == before
        done = cycle.run(rig.loop, trigger="test")
        while done.state is CycleState.DUELLING:
            rig.judge(40)
            done = cycle.run(rig.loop, trigger="test")
        assert done.state is CycleState.PROMOTED
        with rig.store.reading() as c:
            assert promotions(c, "bot")[-1].number == 1
        grown = contents_of(rig.store)
        taken = backup.take(rig.store, tmp_path / "backups", actor="test")
        assert taken.manifest.source == "postgresql"
        assert Archive(taken.path).problems() == []
    third = settings(tmp_path / "third", store={"database": f"sqlite:///{tmp_path / 'third.sqlite'}"})
    assert restore(Archive(taken.path), third, actor="test").problems == []
    with Store.open(third) as store:
        assert contents_of(store) == grown
        assert doctor.check(store) == []


@pytest.mark.postgres
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_sequence_numbers_go_on_and_the_former_tables_are_moved_aside(url: str, tmp_path: Path) -> None:
    config = settings(tmp_path, store={"database": url})
    with Store.open(config) as store:
        put_groups(store, a_group("g"))
        put_picks(store, a_pick("g", "rita"), a_pick("g", "rosa"))
        store.write(lambda c: c.exec_driver_sql("DELETE FROM feedback WHERE rater_id = 'rosa'"))
        taken = backup.take(store, tmp_path / "backups", actor="test")
        put_groups(store, a_group("later"))
        later = contents_of(store)
    done = restore(Archive(taken.path), config, force=True, actor="test")
    assert done.aside is not None
    schema = done.aside.removeprefix("schema ")
    with Store.open(config) as store:
        put_picks(store, a_pick("g", "ruth"))
        with store.reading() as c:
            assert feedback.max_seq(c, "bot") == 3, "the number of the row that is gone is not given again"
            aside = c.execute(sa.text(f"SELECT count(*) FROM {schema}.groups")).scalar()
            assert c.execute(sa.text("SELECT count(*) FROM groups")).scalar() == 1
    assert aside == len(later["groups"]) == 2


@pytest.mark.postgres
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_killed_restore_is_absent_and_what_it_left_is_found(url: str, tmp_path: Path) -> None:
    (tmp_path / "pairloop.toml").write_text(
        f'state_dir = "{tmp_path}"\n[policy]\nmodel = "fake"\nname = "bot"\n[store]\ndatabase = "{url}"\n', encoding="utf-8"
    )
    config = load_config(tmp_path)
    lost, _ = keys.new("lost", [keys.Scope.ADMIN])
    with Store.open(config) as store:
        put_groups(store, a_group("g"))
        store.write(lambda c: keys.insert(c, lost))
        backup.take(store, tmp_path / "backups", actor="test")
        put_groups(store, a_group("later"))
        store.write(lambda c: keys.revoke(c, lost.key_id, datetime.now(UTC), actor="test", reason="lost"))
        later = contents_of(store)
    command = [sys.executable, "-m", "pairloop", "restore", str(tmp_path / "backups"), "--config", str(tmp_path), "--force"]
    planned = {**os.environ, faults.ENVIRONMENT: Fault("restore.before_aside").as_json()}
    killed = subprocess.run(command, env=planned, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    copy = tmp_path / "database.sqlite.restoring"
    assert copy.exists()
    with Store.open(config) as store:
        assert contents_of(store) == later
        assert doctor.check(store) == [], "it may be at work now"
        os.utime(copy, (0, 0))
        assert [one.code for one in doctor.check(store)] == ["unfinished_restore"]
        assert repair.mend(store, actor="test").problems == []
    assert not list(tmp_path.glob("*.restoring*"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 keys and accounts stay as they became since the backup" in done.stdout
    with Store.open(config) as store, store.reading() as c:
        (key,) = keys.list_(c)
        assert key.revoked_at is not None
        assert c.execute(sa.text("SELECT count(*) FROM groups")).scalar() == 1
