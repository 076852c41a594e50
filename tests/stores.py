"""Stores for tests, on the database that the run asks for: SQLite, or PostgreSQL with ``pytest --database postgres``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pairloop.config import Config
from pairloop.store import Store
from pairloop.store.database import parse_url


def open_store(artifacts_dir: Path) -> Store:
    """An empty store without fsync, its database beside its artifacts; a second one of the same folder is another store."""
    artifacts_dir.parent.mkdir(parents=True, exist_ok=True)
    state_dir = Path(tempfile.mkdtemp(prefix="store-", dir=artifacts_dir.parent))
    return Store(parse_url(Config(state_dir=state_dir).database_url), artifacts_dir, durable=False)


def database_of(state_dir: Path) -> dict[str, str]:
    """The section ``store`` of a configuration that other processes read: empty on SQLite."""
    url = Config(state_dir=state_dir).database_url
    return {} if url.startswith("sqlite") else {"database": url}
