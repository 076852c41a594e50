"""Stores for tests, on the database that the run asks for: SQLite, or PostgreSQL with ``pytest --database postgres``."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.engine import URL

from pairloop.config import Config
from pairloop.store import Store
from pairloop.store.database import migrate, parse_url, writer_engine
from pairloop.store.store import Writing


def open_store(artifacts_dir: Path, config: Config | None = None) -> Store:
    """An empty store without fsync, with ``config``'s bounds; a second one of the same folder is another store."""
    artifacts_dir.parent.mkdir(parents=True, exist_ok=True)
    state_dir = Path(tempfile.mkdtemp(prefix="store-", dir=artifacts_dir.parent))
    url = parse_url(Config(state_dir=state_dir).database_url)
    lay_out(url)
    return Store(url, artifacts_dir, replace(Writing.of(config or Config()), synchronous="off"))


def lay_out(url: URL) -> None:
    """The file of an empty store at head where there is none yet: a copy, for migrating a new one costs 70 milliseconds."""
    if url.get_backend_name() == "sqlite" and not (database := Path(str(url.database))).exists():
        database.parent.mkdir(parents=True, exist_ok=True)
        database.write_bytes(_blank_sqlite())


def open_beside(store: Store) -> Store:
    """Another process's store on the same database and artifacts."""
    return Store(store.url, store.artifacts.root, Writing(synchronous="off"))


def database_of(state_dir: Path) -> dict[str, str]:
    """The section ``store`` of a configuration that other processes read: empty on SQLite."""
    url = Config(state_dir=state_dir).database_url
    return {} if url.startswith("sqlite") else {"database": url}


@contextmanager
def somebody_else(store: Store) -> Iterator[Connection]:
    """A connection past the store, which sees what is committed and writes at once; foreign keys are not checked."""
    engine = sa.create_engine(store.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET session_replication_role = replica")
        yield connection


@cache
def _blank_sqlite() -> bytes:
    """A database at head without a row; made once."""
    with tempfile.TemporaryDirectory() as folder:
        made, copy = Path(folder) / "made.sqlite", Path(folder) / "copy.sqlite"
        engine = writer_engine(parse_url(f"sqlite:///{made}"), "off")
        migrate(engine)
        engine.dispose()
        with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        return copy.read_bytes()
