"""Reading a store's database: by the store itself, and by processes that only read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from pairloop.errors import UnavailableError
from pairloop.store.artifacts import ROOT_OPTION
from pairloop.store.database import describe, reader_engine


class Readable(Protocol):
    """What hands out connections that read: a ``Store``, or in another process its ``Reader``."""

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection that sees one snapshot and cannot write."""
        ...


@dataclass(frozen=True, slots=True)
class Reader:
    """A store's database for a process that reads it once; can be pickled, with the password of the URL."""

    url: URL
    artifacts_root: Path

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one snapshot and cannot write. UnavailableError where there is none to be had."""
        engine = reader_engine(self.url)
        engine.update_execution_options(**{ROOT_OPTION: self.artifacts_root})
        try:
            with reading_from(engine, describe(self.url)) as c:
                yield c
        finally:
            engine.dispose()


@contextmanager
def reading_from(engine: Engine, name: str) -> Iterator[Connection]:
    """A connection of ``engine``; UnavailableError, naming the database, where there is none or it breaks."""
    try:
        with engine.connect() as connection:
            yield connection
    except (DBAPIError, PoolTimeoutError) as error:
        raise UnavailableError(f"{name}: {getattr(error, 'orig', None) or error}") from error
