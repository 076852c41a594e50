"""The one writer: a thread that commits everything that waits in one transaction (group commit), and a bounded queue."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from pairloop import faults
from pairloop.errors import ConflictError, InvalidRequestError, StoreBusyError, StoreError, UnavailableError, log_failure

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")

_Outcome = tuple[Any, BaseException | None]
"""What a function returned, or what its future raises."""

MAX_BATCH = 256
"""Functions per transaction: bounds how long the first of them waits for its commit."""
FLUSH_EVERY_S = 1.0
"""Where commits do not wait for the disk: how old one of them may be before it is there."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``batch``: functions per transaction. Beyond so many writes, or so many seconds of the oldest, more are refused."""

    batch: int = MAX_BATCH
    waiting: int = 2_048
    wait_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Committed:
    """One transaction: seconds of its commit (with the fsync, where it waits for one), functions in it, and left waiting."""

    commit_s: float
    batch: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Together(Generic[Item, T]):
    """A faster way for functions of one kind: ``write`` does the items of all that wait at once.

    It gives one result per item, or None for one that is better done by its own function. Where it raises, all of them are.
    """

    write: Callable[[Connection, Sequence[Item]], Sequence[T | None]]
    item: Item


@dataclass(slots=True)
class _Job:
    fn: Callable[[Connection], Any]
    future: Future[Any]
    at: float
    admitted: bool
    together: Together[Any, Any] | None
    outcome: _Outcome | None = None


class GroupCommitWriter:
    """Runs functions of a connection, one after the other; their futures resolve after the commit that holds them.

    All functions that wait share one transaction, so a durable commit is paid once for all of them. Each stands in its own
    savepoint: one that raises is rolled back alone, and its future raises. What the database refuses (a full disk, a lock
    that another process holds) raises StoreError on every future of the batch, and the writer goes on with the next.

    The queue is bounded: see ``submit``. ``flush`` is called within ``FLUSH_EVERY_S`` of a commit, where a commit alone does
    not reach the disk. ``watch``, if set, is told of every commit, in the writer's thread.
    """

    def __init__(
        self, engine: Engine, name: str, *, limits: Limits | None = None, flush: Callable[[], None] | None = None
    ) -> None:
        self._engine = engine
        self._name = name
        self._limits = limits or Limits()
        self._flush = flush
        self._unflushed_since: float | None = None
        self._oldest_at: float | None = None  # when the first function of the batch in work was submitted
        self._in_work = 0
        self.watch: Callable[[Committed], None] | None = None
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="pairloop-store-writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Functions that wait for their commit, those in the transaction that is under way included."""
        return self._queue.qsize() + self._in_work

    @property
    def is_busy(self) -> bool:
        """Whether ``submit`` would refuse."""
        oldest_at = self._oldest_at
        if oldest_at is not None and monotonic() - oldest_at > self._limits.wait_s:
            return True
        return self.waiting >= self._limits.waiting

    def submit(
        self, fn: Callable[[Connection], T], *, admitted: bool = False, together: Together[Any, T] | None = None
    ) -> Future[T]:
        """Queue ``fn``; StoreBusyError, and nothing is queued, where too many wait or the oldest waits for too long.

        ``admitted``: it belongs to what was let in before, and is never refused. Never call this and wait from inside another
        such function: the one writer would wait for itself.
        """
        if not admitted and self.is_busy:
            raise self._busy()
        future: Future[T] = Future()
        with self._closing:  # so that nothing lands behind the end mark
            if self._closed:
                raise StoreError(f"{self._name}: the store is closed")
            self._queue.put(_Job(fn, future, monotonic(), admitted, together))
        return future

    def write(self, fn: Callable[[Connection], T]) -> T:
        """``submit`` and wait. Never refused: a thread that waits for its write submits no other, so threads are the bound."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("store.write() inside a store function waits for itself; use the connection it was given")
        return self.submit(fn, admitted=True).result()

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
                    self._oldest_at, self._in_work = batch[0].at, len(batch)
                    self._commit(batch)
                    self._oldest_at, self._in_work = None, 0
                self._flush_if_due(at_once=not open_)
        finally:  # whatever ends this thread, nobody waits for it in vain
            self._refuse(lambda _: StoreError(f"{self._name}: the store is closed"), for_good=True)

    def _next_batch(self) -> tuple[list[_Job], bool]:
        """Waits for the first job, or until a flush is due, and takes all that wait with it; False marks the end."""
        batch: list[_Job] = []
        try:
            job = self._queue.get(timeout=self._flush_due_s())
            while job is not None:
                if job.future.set_running_or_notify_cancel():
                    batch.append(job)
                if len(batch) >= self._limits.batch:
                    return batch, True
                job = self._queue.get_nowait()
        except Empty:
            return batch, True
        return batch, False

    def _flush_due_s(self) -> float | None:
        if self._unflushed_since is None:
            return None
        return max(0.0, self._unflushed_since + FLUSH_EVERY_S - monotonic())

    def _flush_if_due(self, *, at_once: bool) -> None:
        due_s = self._flush_due_s()
        if self._flush is None or due_s is None or (due_s > 0 and not at_once):
            return
        self._unflushed_since = None
        try:
            self._flush()
        except OSError as error:
            why = (self._name, error.strerror)
            log_failure(logger, error, "%s: committed writes could not be brought to the disk (%s)", *why)

    def _commit(self, batch: list[_Job]) -> None:
        failure: StoreError | None = StoreError(f"{self._name}: the writer stopped")
        try:
            with self._engine.begin() as connection:
                self._run(connection, batch)
                faults.reach("writer.before_commit")
                begun = monotonic()
            faults.reach("writer.before_ack")
            failure = None  # only now: the commit is through
            self._committed(monotonic() - begun, len(batch))
        except (SQLAlchemyError, OSError) as error:
            failure = self._store_error(error)
        finally:
            for job in batch:
                result, problem = (None, failure) if failure is not None or job.outcome is None else job.outcome
                if problem is None:
                    job.future.set_result(result)
                else:
                    job.future.set_exception(problem)
        if failure is not None:  # a locked or full database: what has waited for too long would wait as long again
            until = monotonic() - self._limits.wait_s
            self._refuse(lambda job: self._busy() if not job.admitted and job.at < until else None)

    def _run(self, connection: Connection, batch: list[_Job]) -> None:
        """Every function once, or its faster way; their outcomes stay with the jobs."""
        kinds: dict[Any, list[_Job]] = defaultdict(list)
        for job in batch:
            if job.together is not None:
                kinds[job.together.write].append(job)
        for write, jobs in kinds.items():
            self._run_together(connection, write, jobs)
        for job in batch:
            if job.outcome is None:
                result, error = _attempted(connection, partial(job.fn, connection))
                job.outcome = result, None if error is None else self._explained(error)

    def _run_together(self, connection: Connection, write: Callable[..., Sequence[Any]], jobs: list[_Job]) -> None:
        items = [job.together.item for job in jobs if job.together is not None]
        results, error = _attempted(connection, lambda: write(connection, items))
        if results is None:  # whichever of them was at fault: each is tried again by its own function
            logger.debug("%s: %d writes are done one by one: %s", self._name, len(jobs), error)
            return
        for job, result in zip(jobs, results, strict=True):
            if result is not None:
                job.outcome = result, None

    def _committed(self, commit_s: float, batch: int) -> None:
        if self._flush is not None and self._unflushed_since is None:
            self._unflushed_since = monotonic()
        if self.watch is not None:
            self.watch(Committed(commit_s, batch, self._queue.qsize()))

    def _refuse(self, reason: Callable[[_Job], StoreError | None], *, for_good: bool = False) -> None:
        """Take those with a reason out of the queue; the others keep their order. ``for_good``: take nothing more."""
        with self._closing:
            self._closed = self._closed or for_good
            for _ in range(self._queue.qsize()):
                job = self._queue.get_nowait()
                error = None if job is None else reason(job)
                if job is None or error is None:
                    self._queue.put(job)
                elif job.future.set_running_or_notify_cancel():
                    job.future.set_exception(error)

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

    def _busy(self) -> StoreBusyError:
        limits = self._limits
        return StoreBusyError(
            f"{self._name}: {self.waiting} writes wait for the database, and nothing of this one was stored; the bounds are "
            f"store.max_waiting = {limits.waiting} and store.max_wait = {limits.wait_s:g}s"
        )


_SAVE, _RELEASE, _UNDO = (f"{verb} pairloop_writer" for verb in ("SAVEPOINT", "RELEASE SAVEPOINT", "ROLLBACK TO SAVEPOINT"))


def _attempted(connection: Connection, fn: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What ``fn`` returned or raised, its writes undone. Raises only where the transaction itself is gone."""
    connection.exec_driver_sql(_SAVE)  # as text: SQLAlchemy's own savepoints cost more than what they are around
    try:
        result = fn()
        connection.exec_driver_sql(_RELEASE)
    except BaseException as error:  # noqa: BLE001 - the supervisor's line: it goes to whoever waits on the future
        connection.exec_driver_sql(_UNDO)
        connection.exec_driver_sql(_RELEASE)
        return None, error
    return result, None
