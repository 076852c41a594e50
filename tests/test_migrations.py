"""The schema and the migrations that make it."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Dialect, Engine, create_engine, inspect
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from pairloop.config import Config, StoreSection
from pairloop.errors import ConfigError, PairloopError, StoreError
from pairloop.store import Store
from pairloop.store.database import migrate, parse_url, writer_engine
from pairloop.store.schema import metadata


def engine_at(path: Path) -> Engine:
    return writer_engine(parse_url(f"sqlite:///{path}"), "off")


def described(engine: Engine) -> dict[str, Any]:
    """Everything the database says about its tables, in a comparable form."""
    inspector = inspect(engine)
    tables = {}
    for table in set(inspector.get_table_names()) - {"alembic_version"}:
        tables[table] = {
            "columns": {
                column["name"]: (str(column["type"]), column["nullable"], column["default"])
                for column in inspector.get_columns(table)
            },
            "primary key": inspector.get_pk_constraint(table),
            "indexes": sorted((str(index["name"]), index["column_names"]) for index in inspector.get_indexes(table)),
            "unique": sorted((str(key["name"]), key["column_names"]) for key in inspector.get_unique_constraints(table)),
            "foreign keys": sorted(
                (str(key["name"]), key["constrained_columns"], key["referred_table"], key["referred_columns"])
                for key in inspector.get_foreign_keys(table)
            ),
        }
    with engine.connect() as connection:
        sql = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE sql LIKE '%AUTOINCREMENT%'")
        tables["autoincrement"] = {"names": sorted(name for (name,) in sql)}
    return tables


def test_a_blank_database_migrates_to_exactly_the_schema(tmp_path: Path) -> None:
    migrated = engine_at(tmp_path / "migrated.sqlite")
    migrate(migrated)
    created = create_engine("sqlite://")
    metadata.create_all(created)
    with migrated.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata) == []
    assert described(migrated) == described(created)
    assert set(metadata.tables) <= described(migrated).keys()
    migrated.dispose()
    created.dispose()


def test_migrating_again_changes_nothing(tmp_path: Path) -> None:
    engine = engine_at(tmp_path / "again.sqlite")
    migrate(engine)
    before = described(engine)
    migrate(engine)
    assert described(engine) == before
    engine.dispose()


def test_a_newer_database_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path)
    Store.open(config).close()
    file = tmp_path / "pairloop.sqlite"
    raw = sqlite3.connect(file)
    with raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError) as refused:
        Store.open(config)
    message = str(refused.value)
    assert str(file) in message
    assert "'9999'" in message
    assert "upgrade pairloop" in message
    assert raw.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]
    raw.close()


def test_a_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "pairloop.sqlite"
    file.write_text("these are my holiday notes, not a database\n" * 100)
    with pytest.raises(StoreError, match=r"pairloop\.sqlite: file is not a database"):
        Store.open(Config(state_dir=tmp_path))
    assert file.read_text().startswith("these are my holiday notes")


def test_someone_elses_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "pairloop.sqlite"
    raw = sqlite3.connect(file)
    with raw:
        raw.execute("CREATE TABLE groups (name TEXT)")
    with pytest.raises(StoreError, match=r"pairloop\.sqlite: table .*groups.* already exists"):
        Store.open(Config(state_dir=tmp_path))
    assert raw.execute("SELECT name FROM sqlite_master").fetchall() == [("groups",)]
    raw.close()


def test_a_state_dir_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Store.open(Config(state_dir=tmp_path / "file" / "below"))


def test_a_bad_database_url_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a SQLAlchemy URL"):
        Store.open(Config(state_dir=tmp_path, store=StoreSection(database="no url")))


def test_paths_with_percent_signs_and_spaces_work(tmp_path: Path) -> None:
    with Store.open(Config(state_dir=tmp_path / "100 % sure")) as store:
        assert (tmp_path / "100 % sure" / "pairloop.sqlite").exists()
        assert "100 % sure" in store.name


def test_two_openers_of_a_blank_database_both_get_it(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path)
    start, problems = threading.Barrier(4), []

    def open_it() -> None:
        start.wait()
        try:
            Store.open(config).close()
        except PairloopError as error:
            problems.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_the_database_is_set_up_for_durability(tmp_path: Path) -> None:
    with Store.open(Config(state_dir=tmp_path)) as store:

        def pragma(name: str) -> Any:
            return store.write(lambda c: c.exec_driver_sql(f"PRAGMA {name}").scalar())

        assert pragma("journal_mode") == "wal"
        assert pragma("synchronous") == 2  # FULL
        assert pragma("foreign_keys") == 1
        assert pragma("busy_timeout") == 10_000


def test_the_schema_compiles_for_postgres_too() -> None:
    dialect: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    statements = [str(CreateTable(table).compile(dialect=dialect)) for table in metadata.sorted_tables]
    statements += [
        str(CreateIndex(index).compile(dialect=dialect)) for table in metadata.sorted_tables for index in table.indexes
    ]
    feedback = next(sql for sql in statements if "CREATE TABLE feedback" in sql)
    assert "seq BIGSERIAL" in feedback
    # Postgres cuts names at 63 bytes, and two cut names could be the same.
    names = [str(item.name) for table in metadata.sorted_tables for item in table.constraints]
    names += [str(index.name) for table in metadata.sorted_tables for index in table.indexes]
    assert max(len(name) for name in names) <= 63
    assert len(names) == len(set(names))
