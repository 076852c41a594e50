"""The store: one database of evidence and one place of artifacts, many readers, one writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.engine import URL

from pairloop.config import Config, duration_s
from pairloop.errors import StoreError
from pairloop.redaction import Redactor
from pairloop.store.artifacts import ROOT_OPTION, Artifacts
from pairloop.store.clock import shared_now
from pairloop.store.database import (
    Synchronous,
    describe,
    failing_as_store_error,
    log_flusher,
    migrate,
    parse_url,
    reader_engine,
    scrub,
    writer_engine,
)
from pairloop.store.opening import open_artifacts
from pairloop.store.reader import Reader, reading_from
from pairloop.store.writer import MAX_BATCH, Committed, GroupCommitWriter, Limits, Together

T = TypeVar("T")

Fence = Callable[[Connection], object]
"""Asked in the transaction of each write, before it; raises where the caller may no longer write."""

SCRUBBED_BYTES = 512 << 20
"""The largest SQLite file that is rewritten while the server answers."""


@dataclass(frozen=True, slots=True)
class Writing:
    """How the writer commits: how long it waits for the disk, and the bounds of its queue and its transactions."""

    synchronous: Synchronous = "full"
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def of(cls, config: Config) -> Writing:
        section = config.store
        batch = 1 if section.durability == "commit" else MAX_BATCH
        limits = Limits(batch, section.max_waiting, duration_s(section.max_wait))
        return cls("normal" if section.durability == "async" else "full", limits)


class Store:
    """Opens the database at head, and hands out connections: snapshots to readers, one transaction at a time to the writer."""

    def __init__(self, url: URL, artifacts: Path | Artifacts, writing: Writing | None = None) -> None:
        writing = writing or Writing()
        self.url = url
        self.name = describe(url)
        """The database in words, for messages."""
        self.artifacts = artifacts if isinstance(artifacts, Artifacts) else Artifacts(artifacts)
        self.clock: Callable[[Connection], datetime] = shared_now
        """The time by which leases are judged."""
        self.state_dir: Path | None = None
        """What else is kept on this machine, where the store was opened by a configuration."""
        self._fence: Fence | None = None
        self.redactor: Redactor | None = None
        """What takes personal data out of texts: whoever writes texts asks it first."""
        self._writing = writer_engine(url, writing.synchronous)
        try:
            migrate(self._writing)
        except StoreError:
            self._writing.dispose()
            raise
        self._reading = reader_engine(url)
        for engine in (self._writing, self._reading):
            engine.update_execution_options(**{ROOT_OPTION: self.artifacts.root})
        flush = log_flusher(url) if writing.synchronous == "normal" else None
        self._writer = GroupCommitWriter(self._writing, self.name, limits=writing.limits, flush=flush)

    @classmethod
    def open(cls, config: Config) -> Store:
        """The configured store, migrated to head; StoreError where a newer pairloop wrote the database."""
        url = parse_url(config.database_url)
        if url.get_backend_name() == "sqlite" and url.database:
            with failing_as_store_error(url.database):
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        redactor = Redactor.of(config)
        store = cls(url, open_artifacts(config), Writing.of(config))
        store.redactor, store.state_dir = redactor, config.state_dir
        return store

    def kept_words(self, text: str) -> str:
        """What is stored of an operator's words (a reason, a name): no personal data that this store does not keep."""
        return text if self.redactor is None else self.redactor.text(text)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one snapshot and cannot write. Keep it short: a long one holds back SQLite's checkpoints."""
        with reading_from(self._reading, self.name) as connection:
            yield connection

    def reader(self) -> Reader:
        """What another process reads this database by."""
        return Reader(self.url, self.artifacts.root)

    def fenced(self, fence: Fence | None) -> Store:
        """The same store for a worker that may be overtaken: every write through it first asks ``fence``, in its transaction.

        None takes a fence away.
        """
        view = copy(self)
        view._fence = fence
        return view

    def submit(
        self, fn: Callable[[Connection], T], *, admitted: bool = False, together: Together[Any, T] | None = None
    ) -> Future[T]:
        """Queue ``fn(connection)`` for the writer; the future resolves after the commit. Cost per call falls with concurrency.

        Raises StoreBusyError where more writes wait than store.max_waiting, or the oldest for longer than store.max_wait;
        never for what is ``admitted``: the end of something that was let in before. The future raises what ``fn`` raised (its
        writes undone), ConflictError where a constraint was violated, StoreError where the database could not write. ``fn``
        must not commit, and must not wait for another write. ``together``: a faster way to do many such functions at once.
        """
        if self._fence is not None:
            together = None  # what is written together asks no fence
        return self._writer.submit(self._behind_fence(fn), admitted=admitted, together=together)

    def write(self, fn: Callable[[Connection], T]) -> T:
        """``submit(fn)``, waited for, and never refused: cycles, leases and heartbeats wait for their turn."""
        return self._writer.write(self._behind_fence(fn))

    def _behind_fence(self, fn: Callable[[Connection], T]) -> Callable[[Connection], T]:
        fence = self._fence
        if fence is None:
            return fn

        def fenced(c: Connection) -> T:
            fence(c)
            return fn(c)

        return fenced

    @property
    def waiting(self) -> int:
        """Writes that wait for their commit."""
        return self._writer.waiting

    @property
    def is_busy(self) -> bool:
        """Whether ``submit`` would be refused."""
        return self._writer.is_busy

    def watch_commits(self, watch: Callable[[Committed], None]) -> None:
        """Tell ``watch`` of every transaction of this store, in the writer's thread; it returns at once and raises nothing."""
        self._writer.watch = watch

    def scrub(self, *, limit_bytes: int = SCRUBBED_BYTES) -> bool:
        """After an erasure: rewrite the database's file, if it is no larger than that; see `database.scrub`."""
        return scrub(self._writing, limit_bytes)

    def close(self) -> None:
        """Finish the waiting writes and close all connections; a second call does nothing."""
        self._writer.close()
        self._reading.dispose()
        self._writing.dispose()
        self.artifacts.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
