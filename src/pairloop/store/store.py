"""The store: one database of evidence and one place of artifacts, many readers, one writer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from pairloop.config import Config
from pairloop.errors import StoreError
from pairloop.store.artifacts import ROOT_OPTION, Artifacts
from pairloop.store.database import describe, failing_as_store_error, migrate, parse_url, reader_engine, writer_engine
from pairloop.store.opening import open_artifacts
from pairloop.store.writer import GroupCommitWriter

T = TypeVar("T")


class Store:
    """Opens the database at head, and hands out connections: snapshots to readers, one transaction at a time to the writer."""

    def __init__(self, url: URL, artifacts: Path | Artifacts, *, durable: bool = True, temporary: Path | None = None) -> None:
        self.url = url
        self.name = describe(url)
        """The database in words, for messages."""
        self.artifacts = artifacts if isinstance(artifacts, Artifacts) else Artifacts(artifacts)
        self._temporary = temporary
        self._writing = writer_engine(url, durable=durable)
        try:
            migrate(self._writing)
        except StoreError:
            self._writing.dispose()
            raise
        self._reading = reader_engine(url)
        for engine in (self._writing, self._reading):
            engine.update_execution_options(**{ROOT_OPTION: self.artifacts.root})
        self._writer = GroupCommitWriter(self._writing, self.name)

    @classmethod
    def open(cls, config: Config) -> Store:
        """The configured store, migrated to head; StoreError where a newer pairloop wrote the database."""
        url = parse_url(config.database_url)
        if url.get_backend_name() == "sqlite" and url.database:
            with failing_as_store_error(url.database):
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        return cls(url, open_artifacts(config))

    @classmethod
    def in_memory(cls, artifacts_dir: Path) -> Store:
        """A store for tests, gone when it is closed: the same SQLite in a temporary file, without fsync.

        A file, because SQLite's shared in-memory databases lock whole tables and ignore the busy timeout.
        """
        artifacts_dir.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="store-", dir=artifacts_dir.parent))
        url = make_url("sqlite://").set(database=str(folder / "memory.sqlite"))
        return cls(url, artifacts_dir, durable=False, temporary=folder)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one snapshot and cannot write. Keep it short: a long one holds back SQLite's checkpoints."""
        try:
            with self._reading.connect() as connection:
                yield connection
        except (DBAPIError, PoolTimeoutError) as error:
            raise StoreError(f"{self.name}: {getattr(error, 'orig', None) or error}") from error

    def submit(self, fn: Callable[[Connection], T]) -> Future[T]:
        """Queue ``fn(connection)`` for the writer; the future resolves after the commit. Cost per call falls with concurrency.

        The future raises what ``fn`` raised (its writes undone), ConflictError where a constraint was violated, StoreError
        where the database could not write. ``fn`` must not commit, and must not wait for another write.
        """
        return self._writer.submit(fn)

    def write(self, fn: Callable[[Connection], T]) -> T:
        """``submit(fn)``, waited for."""
        return self._writer.write(fn)

    def close(self) -> None:
        """Finish the waiting writes and close all connections; a second call does nothing."""
        self._writer.close()
        self._reading.dispose()
        self._writing.dispose()
        self.artifacts.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
