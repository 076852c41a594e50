"""Stores for tests, on the database that the run asks for: SQLite, or PostgreSQL with ``pytest --database postgres``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.store import Store
from pairloop.store.database import parse_url


def open_store(artifacts_dir: Path) -> Store:
    """An empty store without fsync, its database beside its artifacts; a second one of the same folder is another store."""
    artifacts_dir.parent.mkdir(parents=True, exist_ok=True)
    state_dir = Path(tempfile.mkdtemp(prefix="store-", dir=artifacts_dir.parent))
    return Store(parse_url(Config(state_dir=state_dir).database_url), artifacts_dir, durable=False)


def open_beside(store: Store) -> Store:
    """Another process's store on the same database and artifacts."""
    return Store(store.url, store.artifacts.root, durable=False)


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
