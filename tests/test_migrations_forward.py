"""Databases of every schema that was ever released, full of rows, brought to this one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from pairloop.config import Config, StoreSection
from pairloop.errors import PairloopError, StoreError
from pairloop.store import Store, cycles, doctor, feedback, groups, versions
from pairloop.store.database import MIGRATIONS, alembic_config, parse_url, writer_engine
from pairloop.store.schema import metadata

SCRIPTS = ScriptDirectory.from_config(AlembicConfig(attributes={}, config_args={"script_location": str(MIGRATIONS)}))
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]
ROWS = 3
EVERY = [REVISIONS[0], *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.postgres]) for name in REVISIONS[1:])]

MEANT: dict[str, dict[str, Any]] = {
    "kind": {"groups": "train", "versions": "full", "verdicts": "hold", "duels": "gate"},
    "pool": {"groups": "train"},
    "source": {"feedback": "human"},
    "label": {"feedback": "A"},
    "state": {"cycle_steps": "failed"},
    "status": {"runs": "succeeded", "jobs": "succeeded", "files": "processed"},
    "purpose": {"files": "fine-tune"},
    "finish_reason": {"completions": "stop"},
    "prompt": {"groups": "Where is my order?"},
    "sampling": {"groups": {"temperature": 0.5, "stop": []}},
    "value": {"feedback": "0.5"},
    "shown_order": {"feedback": [1, 0]},
    "action": {"promotions": "promote", "quarantines": "release"},
}
"""What columns hold whose values must mean something, by table; every other column gets a value of its type."""


def values(table: sa.Table, number: int) -> dict[str, Any]:
    """Row ``number`` of a table: each column filled, by its type and name, and referring to row ``number`` of its parents."""
    parents = {(element.parent.name): element.column for key in table.foreign_key_constraints for element in key.elements}
    row: dict[str, Any] = {}
    for column in table.columns:
        named = parents.get(column.name)
        if named is not None and named.table is table and column.name not in table.primary_key.columns:
            row[column.name] = None if number == 0 else value(named, number - 1)
        else:
            row[column.name] = value(column if named is None else named, number)
    return row


def value(column: sa.Column[Any], number: int) -> Any:
    meant = MEANT.get(column.name, {}).get(column.table.name)
    if meant is not None:
        return meant
    if column.name == "policy":
        return f"bot-{number}" if column.primary_key and len(column.table.primary_key) == 1 else "bot"
    if column.name.endswith("_at"):
        return f"2026-05-04T12:00:0{number}.123456Z"
    match column.type:
        case sa.Boolean():
            return False
        case sa.JSON():
            return {"language": "de"}
        case sa.Integer():
            return number
        case sa.Float():
            return number + 0.5
        case sa.LargeBinary():
            return bytes([number, 0, 0, 0])
    return f"{column.table.name}-{column.name}-{number}"[-(getattr(column.type, "length", None) or 100) :]


def fill(connection: sa.Connection) -> sa.MetaData:
    """Rows in every table of the schema as the database has it."""
    found = sa.MetaData()
    found.reflect(connection)
    for table in found.sorted_tables:
        if table.name != "alembic_version":
            connection.execute(sa.insert(table), [values(table, number) for number in range(ROWS)])
    return found


def at(url: str, revision: str) -> dict[str, list[dict[str, Any]]]:
    """Make a database of this revision and fill it; its rows by table."""
    engine = writer_engine(parse_url(url), "off")
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), revision)
    with engine.begin() as connection:
        found = fill(connection)
        kept = {table.name: rows_of(connection, table) for table in found.sorted_tables if table.name != "alembic_version"}
    engine.dispose()
    return kept


def rows_of(connection: sa.Connection, table: sa.Table) -> list[dict[str, Any]]:
    return [dict(row._mapping) for row in connection.execute(sa.select(table))]


@pytest.fixture
def config(blank_url: str, tmp_path: Path) -> Config:
    return Config(state_dir=tmp_path, store=StoreSection(database=blank_url))


@pytest.fixture
def engine(config: Config) -> Iterator[sa.Engine]:
    opened = sa.create_engine(config.database_url)
    yield opened
    opened.dispose()


@pytest.mark.parametrize("revision", EVERY)
def test_a_database_of_every_release_comes_to_the_present_schema_with_its_rows(
    revision: str, config: Config, engine: sa.Engine
) -> None:
    before = at(config.database_url, revision)
    assert all(len(rows) == ROWS for rows in before.values())
    with Store.open(config) as store:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert context.get_current_revision() == REVISIONS[-1]
            assert compare_metadata(context, metadata) == []
            now = sa.MetaData()
            now.reflect(connection)
            for name, rows in before.items():
                after = rows_of(connection, now.tables[name])
                for row in rows:
                    assert any(row.items() <= other.items() for other in after), f"{name}: {row} is gone or changed"
        with store.reading() as c:  # as this release reads them
            assert groups.get(c, "groups-group_id-0") is not None
            assert len(feedback.history(c, "groups-group_id-1")) == 1
            assert [version.number for version in versions.list_(c, "bot", checkpoints=True)] == list(range(ROWS))
            assert len(cycles.list_(c, "bot")) == ROWS
        assert not [problem for problem in doctor.check(store) if problem.code == "orphan"]


def test_a_migration_that_forgets_a_column_would_be_found(config: Config, engine: sa.Engine) -> None:
    at(config.database_url, REVISIONS[-1])
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE runs DROP COLUMN error"))
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        (missing,) = compare_metadata(context, metadata)
    assert (missing[0], missing[2], missing[3].name) == ("add_column", "runs", "error")


@pytest.mark.parametrize("revision", [None, REVISIONS[0]])
def test_processes_that_start_together_on_an_old_schema_all_get_the_present_one(
    revision: str | None, config: Config, engine: sa.Engine
) -> None:
    if revision is not None:
        at(config.database_url, revision)
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
    with engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == REVISIONS[-1]


def test_a_newer_database_is_refused_and_left_alone(config: Config, engine: sa.Engine) -> None:
    Store.open(config).close()
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"'9999' is not known .* upgrade pairloop"):
        Store.open(config)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == "9999"
