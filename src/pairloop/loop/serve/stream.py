"""Answers on their way: token events as they come, and the stream that stores its group before it ends."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

from sqlalchemy import Connection

from pairloop.loop.serve.plan import Plan
from pairloop.loop.serve.stopwatch import ms_between
from pairloop.policy.protocols import TokenEvent
from pairloop.store import Store, groups, stored
from pairloop.store.waiting import awaitable
from pairloop.types import Completion, FinishReason, Group

logger = logging.getLogger(__name__)

Sink = Callable[[TokenEvent], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """A stored group and, where they were asked for, the token events of each completion."""

    group: Group
    events: tuple[tuple[TokenEvent, ...], ...]


class Events:
    """Token events by completion index; filled from the sampler's thread."""

    def __init__(self, n: int) -> None:
        self._by_index: tuple[list[TokenEvent], ...] = tuple([] for _ in range(n))
        self.count = 0

        self._first: list[float | None] = [None] * n
        self._last: list[float | None] = [None] * n

    def add(self, event: TokenEvent) -> None:
        self._by_index[event.index].append(event)
        self.count += 1
        self._last[event.index] = now = perf_counter()
        if self._first[event.index] is None:
            self._first[event.index] = now

    def timed(self, came_at: float, completions: Iterable[Completion]) -> tuple[Completion, ...]:
        """The completions with the times at which their first and last tokens were told: in a duel both sides in step."""
        return tuple(
            completion
            if first is None or last is None
            else replace(completion, first_token_ms=ms_between(came_at, first), total_ms=ms_between(came_at, last))
            for completion, first, last in zip(completions, self._first, self._last, strict=True)
        )

    def by_index(self) -> tuple[tuple[TokenEvent, ...], ...]:
        return tuple(tuple(events) for events in self._by_index)


class Lockstep:
    """Sides of a duel in step: token i of all sides goes to ``sink`` together, in index order.

    Each version is sampled at a pace of its own, and the champion usually first: as they come, tokens would tell who is who.
    What one side has beyond the others waits; once a side is over, the others go on without it. For any thread.
    """

    def __init__(self, sink: Sink, n: int) -> None:
        self._sink = sink
        self._waiting: tuple[deque[TokenEvent], ...] = tuple(deque() for _ in range(n))
        self._over = [False] * n
        self._lock = threading.Lock()

    def add(self, index: int, event: TokenEvent) -> None:
        """The next token of side ``index``; the event's own index (0: a side is a request of its own) is replaced."""
        with self._lock:
            self._waiting[index].append(replace(event, index=index))
            self._release()

    def end(self, index: int, future: Future[tuple[Completion, ...]]) -> None:
        """Side ``index`` is over. One that failed or was cancelled is not: the whole reply ends with it."""
        if future.cancelled() or future.exception() is not None:
            return
        with self._lock:
            self._over[index] = True
            self._release()

    def _release(self) -> None:
        while any(self._waiting) and all(side or over for side, over in zip(self._waiting, self._over, strict=True)):
            for side in self._waiting:
                if side:
                    self._sink(side.popleft())


class Draw(Protocol):
    """How completions are sampled; ``events`` tells what has been said, ``sink`` takes each token."""

    async def __call__(self, plan: Plan, events: Events, sink: Sink | None) -> tuple[Completion, ...]: ...


class AnswerStream:
    """A group on its way: token batches, then ``finish``; ``abandon`` where the client went away before."""

    def __init__(self, store: Store, plan: Plan, draw: Draw, stored: Callable[[Plan], None]) -> None:
        """``stored`` is told when the whole group has been written."""
        self.plan = plan
        self._stored = stored
        self._store = store
        self._draw = draw
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenEvent | None] = asyncio.Queue()
        self._events = Events(len(plan.versions))
        self._first: list[TokenEvent] = []
        self._task: asyncio.Task[tuple[Completion, ...]] | None = None
        self._closed = False

    @property
    def group(self) -> Group:
        return self.plan.group

    async def open(self) -> None:
        """Commit the group row while sampling begins, and wait for the first tokens (or the failure) to come."""
        row = awaitable(self._store.submit(lambda c: groups.insert(c, self.plan.stored)))
        self._task = asyncio.create_task(self._sampling())
        self._task.add_done_callback(self._ended)
        try:
            await asyncio.shield(row)
            self._first = await self._next_batch()
            if not self._first:
                await self._task
        except BaseException:
            self.abandon()
            raise

    async def batches(self) -> AsyncIterator[list[TokenEvent]]:
        """Token events as they come, all that are waiting at once."""
        batch = self._first
        while batch:
            yield batch
            batch = await self._next_batch()

    async def finish(self) -> Answer:
        """The completions, durable on return; EngineError where sampling failed."""
        assert self._task is not None, "open() comes first"
        completions = self._events.timed(self.plan.asked.came_at, await self._task)
        self._closed = True  # from here on the group is whole, also when the client goes away before the last chunk
        kept = await completions_as_stored(self._store, self.plan, completions)

        def write(c: Connection) -> None:
            groups.finish(c, self.group.group_id, kept)
            stored.insert(c, replace(self.plan.stored, completions=kept), is_listed=self.plan.asked.is_listed)

        await awaitable(self._store.submit(write, admitted=True))
        self._stored(self.plan)
        return Answer(replace(self.group, completions=completions), self._events.by_index())

    def abandon(self) -> None:
        """Stop sampling and record what was sampled so far as abandoned; does nothing after ``finish``."""
        if self._closed:
            return
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        completions = tuple(
            Completion(
                text="".join(event.text for event in events),
                token_ids=tuple(event.token_id for event in events),
                logps=tuple(event.logp for event in events),
                version=number,
                finish_reason=FinishReason.ABANDONED,
            )
            for number, events in zip(self.plan.versions, self._events.by_index(), strict=True)
        )

        timed = self._events.timed(self.plan.asked.came_at, completions)

        def write(c: Connection) -> None:
            groups.finish(c, self.group.group_id, _redacted(self._store, self.plan, timed))

        self._store.submit(write, admitted=True).add_done_callback(_log_failure)

    async def _sampling(self) -> tuple[Completion, ...]:
        return await self._draw(self.plan, self._events, self._sink)

    def _ended(self, task: asyncio.Task[tuple[Completion, ...]]) -> None:
        if not task.cancelled():
            task.exception()  # marked as seen: whoever still listens meets it in finish()
        self._queue.put_nowait(None)

    def _sink(self, event: TokenEvent) -> None:
        """Called from the sampler's thread."""
        if not self._closed:
            self._events.add(event)
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def _next_batch(self) -> list[TokenEvent]:
        batch: list[TokenEvent] = []
        event = await self._queue.get()
        while event is not None:
            batch.append(event)
            if self._queue.empty():
                return batch
            event = self._queue.get_nowait()
        self._queue.put_nowait(None)  # the end stays the end, also for the next call
        return batch


async def completions_as_stored(store: Store, plan: Plan, completions: tuple[Completion, ...]) -> tuple[Completion, ...]:
    """The answers without what is taken out of texts, and what of their tokens and log-probs is then still true."""
    if store.redactor is None or store.redactor.is_quick:
        return _redacted(store, plan, completions)
    return await asyncio.to_thread(_redacted, store, plan, completions)


def _redacted(store: Store, plan: Plan, completions: tuple[Completion, ...]) -> tuple[Completion, ...]:
    redactor = store.redactor
    if redactor is None:
        return completions
    other_prompt = plan.stored.prompt != plan.group.prompt
    return tuple(redactor.completion(completion, other_prompt=other_prompt) for completion in completions)


def _log_failure(future: Future[None]) -> None:
    error = future.exception()
    if error is not None:
        logger.error("an abandoned group could not be closed: %s", error)
