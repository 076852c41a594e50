"""A database as one SQLite file, and back: what a backup holds, and how a store grows from SQLite into Postgres."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, Table
from sqlalchemy.engine import URL, make_url
from sqlalchemy.types import TypeDecorator, TypeEngine

from pairloop.errors import ConflictError, StoreError
from pairloop.store.database import (
    BUSY_TIMEOUT_MS,
    MIGRATIONS,
    alembic_config,
    describe,
    failing_as_store_error,
    migrate,
    reader_engine,
    writer_engine,
)
from pairloop.store.schema import metadata

CLOSING_S = 2.0
"""How long a connection that is closing may still be seen by PostgreSQL."""
STEP_PAGES = 256
"""SQLite pages copied at a stretch; between two stretches whoever writes has the disk."""
_ROWS_AT_ONCE = 1_000
_VERSION_TABLE = "alembic_version"


def sqlite_url(path: Path) -> URL:
    return make_url("sqlite://").set(database=str(path))


def export(url: URL, target: Path) -> None:
    """Write what one snapshot of the database shows into the SQLite file ``target``, at the database's own revision.

    Nobody waits for it: of SQLite the pages are copied in short steps from one read transaction, of another database the rows
    of one REPEATABLE READ transaction. StoreError where either cannot be read or written.
    """
    if url.get_backend_name() == "sqlite":
        if not url.database:
            raise StoreError("a database in memory cannot be backed up; give store.database a file")
        with _failing(url):
            _copy_pages(str(url.database), target)
        return
    with _engine(reader_engine(url)) as source, _engine(writer_engine(sqlite_url(target), "off")) as copy:
        migrate(copy)
        with failing_as_store_error(describe(url)), source.connect() as reading, copy.begin() as writing:
            _copy_rows(reading.execution_options(isolation_level="REPEATABLE READ"), writing)
    as_one_file(target)


def load(source: Path, url: URL, *, aside: str | None) -> None:
    """Fill the database at ``url``, which is not SQLite, from a file that ``export`` wrote, all in one transaction.

    Tables of ours that are there already are moved into the schema ``aside``; without one they must hold no rows. ConflictError
    while another process of ours is connected.
    """
    target = writer_engine(url)
    with (
        _engine(reader_engine(sqlite_url(source))) as file,
        _engine(target),
        failing_as_store_error(describe(url)),
        file.connect() as reading,
        target.begin() as writing,
    ):
        _refuse_others(writing)
        if aside is not None:
            _move_aside(writing, aside)
        command.upgrade(alembic_config(writing), "head")
        _copy_rows(reading, writing)


def has_rows(c: Connection) -> bool:
    """True where the database holds anything of ours."""
    there = set(sa.inspect(c).get_table_names())
    tables = (table for table in metadata.sorted_tables if table.name in there)
    return any(c.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() for table in tables)


def count_rows(c: Connection) -> dict[str, int]:
    """Rows by table."""
    return {
        table.name: c.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() for table in metadata.sorted_tables
    }


def revision(c: Connection) -> str:
    """The schema's revision; StoreError where the database has none."""
    found = MigrationContext.configure(c).get_current_revision()
    if found is None:
        raise StoreError(f"{describe(c.engine.url)}: not a database of pairloop")
    return found


def known_revisions() -> set[str]:
    """The revisions that this pairloop can migrate forward from."""
    return {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}


# --- SQLite to SQLite: pages


def _copy_pages(database: str, target: Path) -> None:
    """Copy the file's pages as one read transaction sees them: later commits neither wait nor start the copy anew."""
    with closing(sqlite3.connect(database, isolation_level=None)) as source, closing(sqlite3.connect(target)) as copy:
        source.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_master").fetchone()  # takes the snapshot; BEGIN alone does not
        copy.execute("PRAGMA synchronous = OFF")  # flushed in turn by _Pace, and at the end
        with target.open("rb") as file:
            source.backup(copy, pages=STEP_PAGES, progress=_Pace(file.fileno()))
        source.execute("ROLLBACK")
    as_one_file(target)


class _Pace:
    """Told after every step: flushes what was written and rests as long as the step took, so that commits come between."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._since = time.monotonic()

    def __call__(self, _status: int, _remaining: int, _total: int) -> None:
        os.fsync(self._descriptor)
        time.sleep(min(0.1, time.monotonic() - self._since))
        self._since = time.monotonic()


def as_one_file(path: Path) -> None:
    """Leave no write-ahead log beside the file, and everything on disk."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    with path.open("rb") as file:
        os.fsync(file.fileno())


# --- between databases: rows


def _copy_rows(source: Connection, target: Connection) -> None:
    for table in metadata.sorted_tables:
        rows = source.execute(_reading(table), execution_options={"yield_per": _ROWS_AT_ONCE})
        for part in rows.mappings().partitions():
            target.execute(_writing(table, target), [dict(row) for row in part])
    for table in (table for table in metadata.sorted_tables if table.dialect_options["sqlite"]["autoincrement"]):
        _set_sequence(target, table, _sequence(source, table))


def _reading(table: Table) -> sa.Select[Any]:
    """All columns as the database holds them: packed bytes and JSON text are copied, not read and written anew."""
    columns = [
        (sa.cast(column, sa.Text) if isinstance(column.type, sa.JSON) else sa.type_coerce(column, _plain(column.type))).label(
            _parameter(column.name)
        )
        for column in table.columns
    ]
    return sa.select(*columns).order_by(*table.primary_key.columns)  # a version comes after its parent


def _writing(table: Table, target: Connection) -> sa.Insert:
    values = {
        column.name: _value(_parameter(column.name), column.type, is_sqlite=target.dialect.name == "sqlite")
        for column in table.columns
    }
    return sa.insert(table).values(values)


def _value(name: str, kind: TypeEngine[Any], *, is_sqlite: bool) -> sa.ColumnElement[Any]:
    if not isinstance(kind, sa.JSON):
        return sa.bindparam(name, type_=_plain(kind))
    text = sa.bindparam(name, type_=sa.Text)
    return text if is_sqlite else sa.cast(text, sa.JSON)  # SQLite would cast text that looks like a number to one


def _plain(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    return kind.impl_instance if isinstance(kind, TypeDecorator) else kind


def _parameter(column: str) -> str:
    return f"copied_{column}"  # a parameter may not be called like its column


def _sequence(c: Connection, table: Table) -> int:
    """The last number that the table gave, also where its row is gone: numbers are never given again."""
    if c.dialect.name == "sqlite":
        found = c.execute(sa.text("SELECT seq FROM sqlite_sequence WHERE name = :name"), {"name": table.name}).scalar()
    else:
        name = c.execute(sa.select(_serial(table))).scalar_one()
        found = c.exec_driver_sql(f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {name}").scalar()
    return int(found or 0)


def _set_sequence(c: Connection, table: Table, last: int) -> None:
    if c.dialect.name == "sqlite":
        c.execute(sa.text("DELETE FROM sqlite_sequence WHERE name = :name"), {"name": table.name})
        c.execute(sa.text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :seq)"), {"name": table.name, "seq": last})
    elif last:
        c.execute(sa.select(sa.func.setval(_serial(table), last)))


def _serial(table: Table) -> sa.Function[Any]:
    (column,) = table.primary_key.columns
    return sa.func.pg_get_serial_sequence(table.name, column.name)


def _refuse_others(c: Connection) -> None:
    """ConflictError where another process of ours stays connected to this database.

    The server takes a moment to forget connections that were closed just now.
    """
    others = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pairloop' "
        "AND pid <> pg_backend_pid()"
    )
    until_s = time.monotonic() + CLOSING_S
    while c.execute(others).scalar_one():
        if time.monotonic() >= until_s:
            raise ConflictError(f"{describe(c.engine.url)}: a process has it open; stop the server and its workers first")
        c.exec_driver_sql("SELECT pg_sleep(0.05), pg_stat_clear_snapshot()")


def _move_aside(c: Connection, schema: str) -> None:
    """Move our tables into a schema of their own; their indexes and sequences go with them."""
    quote = c.dialect.identifier_preparer.quote
    c.execute(sa.schema.CreateSchema(schema))
    for name in {*metadata.tables, _VERSION_TABLE} & set(sa.inspect(c).get_table_names()):
        c.exec_driver_sql(f"ALTER TABLE {quote(name)} SET SCHEMA {quote(schema)}")


@contextmanager
def _engine(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _failing(url: URL) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{describe(url)}: {error}") from error
