"""Engines and migrations: everything that knows which database stands behind the store.

Errors hide the parameters of their statement: they are people's messages, and errors are logged.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from pairloop.errors import ConfigError, StoreError, UnavailableError
from pairloop.store import postgres
from pairloop.store.columns import dump_json

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_MS = 10_000
"""How long a writer waits for another process's transaction before the database counts as locked."""

# Readers are the web server's worker threads; a SQLite connection is a file handle and a page cache.
# The one used last comes first, so that few keep their statements compiled, 2 MB each, and those few do have them.
_READER_POOL = {"pool_size": 32, "max_overflow": 96, "pool_use_lifo": True}


def parse_url(database: str) -> URL:
    """The SQLAlchemy URL; ConfigError where ``database`` is not one, or its driver is not installed."""
    try:
        url = make_url(database)
        url.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"store.database: {database!r} is not a SQLAlchemy URL, such as sqlite:///pairloop.sqlite") from error
    except ModuleNotFoundError as error:
        hint = 'for postgresql+psycopg:// pip install "pairloop[postgres]"'
        raise ConfigError(f"store.database: {describe(url)} needs the package {error.name}: {hint}") from error
    return url


def describe(url: URL) -> str:
    """What to call this database in an error message: the file, or the URL without its password."""
    if url.get_backend_name() == "sqlite" and url.database:
        return url.database
    return url.render_as_string(hide_password=True)


WRITER_CACHE_KB = 64 * 1024
"""SQLite's own 2 MB hold the indexes of a few thousand groups; beyond, each pick reads them anew. Taken as it is needed."""

LOG_PAGES = 16_384
"""64 MB of write-ahead log, then SQLite brings it into the file while the writer waits: some 50 ms, but seldom. At its own
1,000 pages that was one commit in twenty."""

Synchronous = Literal["full", "normal", "off"]
"""How long a commit waits for the disk: until the write is there, not at all but never breaking the file, not at all."""


def writer_engine(url: URL, synchronous: Synchronous = "full") -> Engine:
    """The engine of the one writer thread: each transaction takes the write lock at once.

    ``full``: each commit is fsynced. ``normal``: a killed process loses nothing, a power failure the last moments. ``off``:
    for tests, a power failure may break a SQLite file.
    """
    if postgres.is_postgres(url):
        engine = create_engine(url, json_serializer=dump_json, hide_parameters=True, **postgres.writer_options(url))
        _prepare_postgres(engine, synchronous)
        postgres.one_at_a_time(engine)
        return engine
    engine = create_engine(url, json_serializer=dump_json, hide_parameters=True)
    if url.get_backend_name() == "sqlite":
        pragmas = ["journal_mode = WAL", f"synchronous = {synchronous.upper()}", "foreign_keys = ON"]
        pragmas.append("secure_delete = ON")  # what is erased is overwritten, not only forgotten
        pragmas += [f"cache_size = -{WRITER_CACHE_KB}", f"wal_autocheckpoint = {LOG_PAGES}"]
        _prepare_sqlite(engine, pragmas, begin="BEGIN IMMEDIATE")
    return engine


def _prepare_postgres(engine: Engine, synchronous: Synchronous) -> None:
    """A server may be set up not to wait for its disk; a stronger setting of its own than ours (a standby's copy) stays."""
    setting = "on" if synchronous == "full" else "off"
    only = "current_setting('synchronous_commit') = 'off'" if synchronous == "full" else "true"

    @event.listens_for(engine, "connect")
    def on_connect(connection: DBAPIConnection, _record: Any) -> None:
        with closing(connection.cursor()) as cursor:
            cursor.execute(f"SELECT set_config('synchronous_commit', '{setting}', false) WHERE {only}")
        connection.commit()


def log_flusher(url: URL) -> Callable[[], None] | None:
    """What brings committed writes to the disk that their commit left in the system's cache; None where the server does it.

    Of SQLite: an fsync of the write-ahead log, and of its folder, which names it.
    """
    if url.get_backend_name() != "sqlite" or not url.database:
        return None
    log = Path(f"{url.database}-wal")

    def flush() -> None:
        for path in (log, log.parent):
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # SQLite removes the log with the last connection, after it brought all of it to the disk
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    return flush


def reader_engine(url: URL) -> Engine:
    """The engine of everybody else: a snapshot per transaction, and nothing can be written through it."""
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, json_serializer=dump_json, hide_parameters=True, **_READER_POOL)
        _prepare_sqlite(engine, ["query_only = ON"], begin="BEGIN")
        return engine
    options = postgres.reader_options(url) if postgres.is_postgres(url) else {}
    return create_engine(url, json_serializer=dump_json, hide_parameters=True, **options)


def _prepare_sqlite(engine: Engine, pragmas: list[str], *, begin: str) -> None:
    """Pragmas on connect, and our own BEGIN: the driver would begin late and deferred, and commit behind savepoints."""

    @event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in (f"busy_timeout = {BUSY_TIMEOUT_MS}", *pragmas):
            _set_pragma(connection, pragma)

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _set_pragma(connection: sqlite3.Connection, pragma: str) -> None:
    """Sets it, waiting as long as the busy timeout: SQLite does not, where another opener changes the journal mode as well."""
    until_s = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute(f"PRAGMA {pragma}").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= until_s:
                raise
        time.sleep(0.005)


def migrate(engine: Engine) -> None:
    """Bring the schema to head; StoreError where the database is from a newer pairloop, is not ours, or cannot be opened."""
    name = describe(engine.url)
    with failing_as_store_error(name), engine.begin() as connection:
        if postgres.is_postgres(engine.url):
            postgres.refuse_other_encodings(connection, name)
        head, known = _revisions()
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in known:
            raise StoreError(
                f"{name}: schema revision {current!r} is not known to this pairloop, which goes up to {head!r}. A newer "
                "pairloop wrote this database: upgrade pairloop, or point store.database (or state_dir) at another file. "
                "Nothing was changed."
            )
        if current != head:
            command.upgrade(alembic_config(connection), "head")


@cache
def _revisions() -> tuple[str | None, frozenset[str]]:
    """The newest revision of the schema, and all there are."""
    scripts = ScriptDirectory(MIGRATIONS)
    return scripts.get_current_head(), frozenset(script.revision for script in scripts.walk_revisions())


def alembic_config(connection: Connection) -> AlembicConfig:
    """Alembic's settings without an ini file: our migrations folder, run on this very connection (see migrations/env.py)."""
    settings = AlembicConfig()
    settings.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    settings.set_main_option("path_separator", "os")
    settings.attributes["connection"] = connection
    return settings


@contextmanager
def failing_as_store_error(name: str) -> Iterator[None]:
    """Turns a database that cannot be used into a StoreError that names it."""
    try:
        yield
    except SQLAlchemyError as error:
        raise UnavailableError(f"{name}: {getattr(error, 'orig', None) or error}") from error
    except OSError as error:
        raise UnavailableError(f"{name}: {error}") from error


def scrub(engine: Engine, limit_bytes: int) -> bool:
    """Rewrite SQLite's file, so that nothing that was erased is left in it, nor in its log. False where it is too large for
    that (writers wait meanwhile, about ten seconds for a gigabyte) or is read all the time. Elsewhere that is the server's
    own business (PostgreSQL's autovacuum)."""
    if engine.url.get_backend_name() != "sqlite" or not engine.url.database:
        return True
    if Path(engine.url.database).stat().st_size > limit_bytes:
        return False
    raw = engine.raw_connection()
    try:
        connection: Any = raw.driver_connection
        connection.execute("VACUUM").close()
        (is_busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not is_busy
    except sqlite3.OperationalError as error:  # another process writes for longer than we wait
        if error.sqlite_errorcode not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreError(f"{describe(engine.url)}: {error}") from error
        return False
    finally:
        raw.close()


def broken_pages(connection: Connection) -> list[str]:
    """What SQLite's own check of the file finds; nothing elsewhere, where the server looks after its files."""
    if connection.dialect.name != "sqlite":
        return []
    return [line for (line,) in connection.exec_driver_sql("PRAGMA quick_check") if line != "ok"]


@cache
def _count_of_sqlite() -> Callable[[], int] | None:
    """SQLite's own function that tells the bytes it holds; None where Python's library does not let us at it."""
    try:
        count = ctypes.CDLL(_sqlite3.__file__).sqlite3_memory_used
    except (AttributeError, OSError):
        return None
    count.restype = ctypes.c_int64
    return cast(Callable[[], int], count)


def sqlite_memory_bytes() -> int | None:
    """Memory that SQLite holds in this process, all connections together; None where it cannot be told."""
    count = _count_of_sqlite()
    return None if count is None else count()


def size_bytes(connection: Connection) -> int | None:
    """How large the database is; None where its system does not tell."""
    if connection.dialect.name == "sqlite":
        pages, page = (connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size"))
        return int(pages) * int(page)
    if connection.dialect.name == "postgresql":
        return int(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one())
    return None
