"""Backups of PostgreSQL, and the way from SQLite to PostgreSQL and back, on a server that the test starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.loop_rig import open_rig, settings
from tests.store_rows import a_group, a_pick, contents_of, put_groups, put_picks
from tests.test_postgres import binary, url

from pairloop.loop import cycle
from pairloop.store import Store, backup, doctor, feedback
from pairloop.store.archive import Archive
from pairloop.store.restore import restore
from pairloop.store.versions import promotions
from pairloop.types import CycleState

__all__ = ["url"]  # the fixture


@pytest.mark.slow
@pytest.mark.skipif(binary("initdb") is None, reason="PostgreSQL's initdb is not installed")
def test_a_store_grows_from_sqlite_into_postgres_and_back(url: str, tmp_path: Path) -> None:
    """Three stores with the same rows; the loop goes on in the second one."""
    pytest.importorskip("psycopg", reason='needs the extra "postgres"')
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


@pytest.mark.slow
@pytest.mark.skipif(binary("initdb") is None, reason="PostgreSQL's initdb is not installed")
def test_sequence_numbers_go_on_and_the_former_tables_are_moved_aside(url: str, tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason='needs the extra "postgres"')
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
