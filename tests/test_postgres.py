"""The store on PostgreSQL: what is its own there, and what is said where it cannot be used. The rest: make test-postgres."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from tests.loop_rig import open_rig, settings
from tests.postgres import PostgresServer, missing, running_server
from tests.store_rows import BOT, a_group, a_pick, put_groups, put_picks, read
from tests.stores import somebody_else
from tests.test_fine_tuning import pair_rows
from tests.waiting import until

from pairloop.config import Config, StoreSection
from pairloop.errors import ConfigError, StoreError
from pairloop.loop import cycle, jobs
from pairloop.store import Store, doctor, feedback, groups, postgres
from pairloop.store.database import parse_url
from pairloop.store.jobs import walk
from pairloop.types import CycleState, GroupKind

needs_postgres = pytest.mark.skipif(missing() is not None, reason=str(missing()))
KINDS = [GroupKind.TRAIN]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server() as started:
        yield started


@pytest.fixture
def config(server: PostgresServer, tmp_path: Path) -> Config:
    return Config(state_dir=tmp_path, store=StoreSection(database=server.migrated()))


@pytest.fixture
def store(config: Config) -> Iterator[Store]:
    with Store.open(config) as opened:
        yield opened


@pytest.mark.postgres
@needs_postgres
def test_two_cycles_from_picks_to_a_better_champion(server: PostgresServer, tmp_path: Path) -> None:
    config = settings(tmp_path, store={"database": server.migrated()})
    with open_rig(config) as rig:
        for number in (1, 2):
            rig.serve(60)
            done = cycle.run(rig.loop, trigger="test")
            while done.state is CycleState.DUELLING:
                rig.judge(40)
                done = cycle.run(rig.loop, trigger="test")
            assert (done.number, done.state) == (number, CycleState.PROMOTED)
        assert rig.champion == 2
        assert doctor.check(rig.store) == []
    with open_rig(config) as again:  # the schema is there, and is at head
        assert again.champion == 2


@pytest.mark.postgres
@needs_postgres
def test_a_fine_tuning_job_from_rows_to_a_model(server: PostgresServer, tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, store={"database": server.migrated()})) as rig:
        config, rows = rig.loop.config, BytesIO(pair_rows(64))
        file = jobs.upload(rig.store, config, rows, filename="rows.jsonl", purpose="fine-tune")
        body = {"training_file": file.file_id, "model": "bot", "method": {"type": "dpo"}, "metadata": {"team": "a"}}
        made = [jobs.create(rig.store, config, jobs.JobRequest.model_validate(body)) for _ in range(2)]
        while jobs.validate_next(rig.loop):
            pass
        jobs.pause(rig.store, made[0].job_id)
        assert jobs.train_next(rig.loop, lambda: False)
        jobs.resume(rig.store, made[0].job_id)
        jobs.cancel(rig.store, made[0].job_id)
        with rig.store.reading() as c:
            ended = [jobs.get(c, job.job_id) for job in made]
            listed = [job.job_id for job in walk(c)]
        assert [str(job.status) for job in ended] == ["cancelled", "succeeded"], ended
        assert listed == [job.job_id for job in made[::-1]]
        assert doctor.check(rig.store) == []


@pytest.mark.postgres
@needs_postgres
def test_another_writer_that_does_not_end_is_a_store_error_and_the_writer_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "LOCK_TIMEOUT_MS", 50)
    with Store.open(config) as store, somebody_else(store) as other:
        other.execute(sa.select(sa.func.pg_advisory_lock(postgres.WRITER_LOCK)))
        refused = [store.submit(partial(groups.insert, group=a_group(f"r{n}"))) for n in range(3)]
        for future in refused:
            with pytest.raises(StoreError, match="lock timeout"):
                future.result()
        assert read(store, groups.count, BOT) == 0, "readers wait for nobody"
        other.execute(sa.select(sa.func.pg_advisory_unlock(postgres.WRITER_LOCK)))
        put_groups(store, a_group("free again"))
        assert read(store, groups.count, BOT) == 1


@pytest.mark.postgres
@needs_postgres
def test_a_writer_that_was_stopped_in_mid_transaction_holds_the_others_up_no_longer_than_its_time(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process that was sent SIGSTOP, or whose machine is gone: it says nothing more, and does not end."""
    with monkeypatch.context() as patch:
        patch.setattr(postgres, "IDLE_TIMEOUT_MS", 2_000)  # from one statement to the next, on a busy machine, too
        stopped = Store.open(config)
    with stopped, Store.open(config) as store, stopped._writing.connect() as held:
        groups.insert(held, a_group("half"))
        feedback.insert(held, a_pick("half"))  # psycopg's executemany alone would not start the server's clock
        put_groups(store, a_group("whole"))
        with pytest.raises(sa.exc.DBAPIError, match="idle-in-transaction timeout"):
            groups.insert(held, a_group("late"))
        held.invalidate()
        assert read(store, groups.get, "half") is None
        put_groups(stopped, a_group("its next one"))
        assert read(store, groups.count, BOT) == 2


@pytest.mark.postgres
@needs_postgres
def test_a_server_that_was_killed_and_started_again_costs_what_was_under_way(server: PostgresServer, store: Store) -> None:
    put_groups(store, a_group("before"))

    def die(c: Connection) -> None:
        groups.insert(c, a_group("under way"))
        server.kill()

    with pytest.raises(StoreError, match="nothing of this was stored"):
        store.write(die)
    with pytest.raises(StoreError):
        put_groups(store, a_group("meanwhile"))
    server.start_again()
    put_groups(store, a_group("after"))
    assert read(store, groups.get, "before") is not None
    assert read(store, groups.get, "under way") is None
    assert read(store, groups.count, BOT) == 2


@pytest.mark.postgres
@needs_postgres
def test_planted_fault_without_the_writer_lock_a_reader_misses_a_row(config: Config, store: Store) -> None:
    """The row with the lower number is committed last: whoever went on from the higher one never sees it."""
    for name in ("low", "high"):
        put_groups(store, a_group(name))
    unlocked = sa.create_engine(config.database_url)
    with unlocked.begin() as slow:
        feedback.insert(slow, a_pick("low"))
        with unlocked.begin() as quick:
            feedback.insert(quick, a_pick("high"))
        seen, after = read(store, feedback.labelled_since, BOT, after_seq=0, kinds=KINDS)
    more, _ = read(store, feedback.labelled_since, BOT, after_seq=after, kinds=KINDS)
    assert [one.group.group_id for one in seen + more] == ["high"], "the lock is what test_writers.py rests on"
    unlocked.dispose()


@pytest.mark.postgres
@needs_postgres
def test_with_the_writer_lock_the_second_row_waits_for_the_first(config: Config, store: Store) -> None:
    for name in ("low", "high"):
        put_groups(store, a_group(name))
    with Store.open(config) as other:
        with store._writing.begin() as slow:
            feedback.insert(slow, a_pick("low"))
            waiting = other.submit(partial(feedback.insert, row=a_pick("high")))
            until(lambda: _waits_for_the_lock(config))
            assert not waiting.done()
            seen, after = read(store, feedback.labelled_since, BOT, after_seq=0, kinds=KINDS)
            assert (seen, after) == ([], 0)
        waiting.result()
        seen, _ = read(store, feedback.labelled_since, BOT, after_seq=after, kinds=KINDS)
        assert {one.group.group_id for one in seen} == {"low", "high"}
        assert [pick.revision for pick in put_picks(other, a_pick("low"))] == [1]


def _waits_for_the_lock(config: Config) -> bool:
    with sa.create_engine(config.database_url, poolclass=sa.NullPool).connect() as c:
        return bool(c.execute(sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")).scalar())


@pytest.mark.postgres
@needs_postgres
def test_a_database_that_cannot_hold_all_texts_is_refused(server: PostgresServer, tmp_path: Path) -> None:
    with sa.create_engine(server.url("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool).connect() as admin:
        provider = "LOCALE_PROVIDER libc" if (admin.dialect.server_version_info or (0,)) >= (15,) else ""
        admin.exec_driver_sql(f"CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C' {provider}")
    with pytest.raises(StoreError, match="encoding is SQL_ASCII, and texts need UTF8"):
        Store.open(Config(state_dir=tmp_path, store=StoreSection(database=server.url("ascii"))))


def test_a_driver_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as Python marks a module that cannot be imported
    with pytest.raises(ConfigError, match=r'needs the package psycopg: .*"pairloop\[postgres\]"') as caught:
        parse_url("postgresql+psycopg://pairloop:secret@127.0.0.1/pairloop")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["not a url", "nosuchdatabase://host/name"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a SQLAlchemy URL"):
        parse_url(text)


def test_a_server_that_is_away_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason='needs the extra "postgres"')
    with socket.socket() as taken:  # bound, and not listened on
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        config = settings(tmp_path, store={"database": f"postgresql+psycopg://pairloop:secret@127.0.0.1:{port}/pairloop"})
        with pytest.raises(StoreError, match=rf"127\.0\.0\.1:{port}") as caught:
            Store.open(config)
    assert "secret" not in str(caught.value)
