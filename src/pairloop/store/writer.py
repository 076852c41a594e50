"""The one writer: a thread that commits everything that waits in one transaction (group commit)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from pairloop import faults
from pairloop.errors import ConflictError, InvalidRequestError, StoreError, UnavailableError

T = TypeVar("T")

MAX_BATCH = 256
"""Functions per transaction: bounds how long the first of them waits for its commit."""


@dataclass(frozen=True, slots=True)
class _Job:
    fn: Callable[[Connection], Any]
    future: Future[Any]


_Outcome = tuple[Any, BaseException | None]
"""What a function returned, or what its future raises."""


class GroupCommitWriter:
    """Runs functions of a connection, one after the other; their futures resolve after the commit that holds them.

    All functions that wait share one transaction, so a durable commit is paid once for all of them. Each stands in its own
    savepoint: one that raises is rolled back alone, and its future raises. What the database refuses (a full disk, a lock
    that another process holds) raises StoreError on every future of the batch, and the writer goes on with the next.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="pairloop-store-writer", daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[[Connection], T]) -> Future[T]:
        """Queue ``fn``; never call this and wait from inside another such function: the one writer would wait for itself."""
        future: Future[T] = Future()
        with self._closing:  # so that nothing lands behind the end mark
            if self._closed:
                raise StoreError(f"{self._name}: the store is closed")
            self._queue.put(_Job(fn, future))
        return future

    def write(self, fn: Callable[[Connection], T]) -> T:
        if threading.current_thread() is self._thread:
            raise RuntimeError("store.write() inside a store function waits for itself; use the connection it was given")
        return self.submit(fn).result()

    def close(self) -> None:
        """Refuse new work, finish what waits, stop the thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        open_ = True
        try:
            while open_:
                batch, open_ = self._next_batch()
                if batch:
                    self._commit(batch)
        finally:  # whatever ends this thread, nobody waits for it in vain
            self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        with self._closing:
            self._closed = True
            while not self._queue.empty():
                job = self._queue.get_nowait()
                if job is not None and job.future.set_running_or_notify_cancel():
                    job.future.set_exception(StoreError(f"{self._name}: the store is closed"))

    def _next_batch(self) -> tuple[list[_Job], bool]:
        """Waits for the first job and takes all that wait with it; False marks the end."""
        batch: list[_Job] = []
        job = self._queue.get()
        while job is not None:
            if job.future.set_running_or_notify_cancel():
                batch.append(job)
            if len(batch) >= MAX_BATCH:
                return batch, True
            try:
                job = self._queue.get_nowait()
            except Empty:
                return batch, True
        return batch, False

    def _commit(self, batch: list[_Job]) -> None:
        outcomes: list[_Outcome] = [(None, StoreError(f"{self._name}: the writer stopped"))] * len(batch)
        try:
            with self._engine.begin() as connection:
                attempted = [self._attempt(connection, job.fn) for job in batch]
                faults.reach("writer.before_commit")
            faults.reach("writer.before_ack")
            outcomes = attempted  # only now: the commit is through
        except (SQLAlchemyError, OSError) as error:
            outcomes = [(None, self._store_error(error)) for _ in batch]
        finally:
            for job, (result, problem) in zip(batch, outcomes, strict=True):
                if problem is None:
                    job.future.set_result(result)
                else:
                    job.future.set_exception(problem)

    def _attempt(self, connection: Connection, fn: Callable[[Connection], Any]) -> _Outcome:
        """The function's result or what it raised, its writes undone. Raises only where the transaction itself is gone."""
        savepoint = connection.begin_nested()
        try:
            result = fn(connection)
            savepoint.commit()
        except BaseException as error:  # the supervisor's line: it goes to whoever waits on the future
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise  # with the connection all of the transaction is gone
            if savepoint.is_active:
                savepoint.rollback()
            return None, self._explained(error)
        return result, None

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, IntegrityError):
            explained: BaseException = ConflictError(f"{self._name}: {error.orig}")
        elif isinstance(error, DBAPIError):
            explained = self._store_error(error)
        elif isinstance(error, UnicodeEncodeError):
            explained = InvalidRequestError(f"the text holds half of a surrogate pair, which is not Unicode: {error}")
        else:
            return error
        explained.__cause__ = error
        return explained

    def _store_error(self, error: SQLAlchemyError | OSError) -> StoreError:
        explained = UnavailableError(f"{self._name}: nothing of this was stored: {getattr(error, 'orig', None) or error}")
        explained.__cause__ = error
        return explained
