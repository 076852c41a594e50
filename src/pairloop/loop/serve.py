"""Serve: one request becomes one group, recorded before it is answered.

A bare policy name is answered by the champion. A comparison (two answers) is, by the rater's pool: both from the champion
(train pool, or gate pool without a duel), or one of the champion and one of the challenger, a fair coin deciding which comes
first (gate pool while a duel is open). A request that names a version itself (``name@12``) never trains and never duels,
whoever asks: its group is ``heldout`` in the gate pool. Which versions answer is read once per request, in one transaction, so
the completions of a group never straddle a swap.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import EngineError, InvalidRequestError, NotFoundError
from pairloop.policy.protocols import Sampler, SampleRequest, TokenEvent
from pairloop.store import Store, duels, groups, versions
from pairloop.store.ids import new_group_id
from pairloop.types import (
    BASE_VERSION,
    Alias,
    Completion,
    Duel,
    FinishReason,
    Group,
    GroupKind,
    Message,
    Pool,
    SamplingParams,
    Version,
)

logger = logging.getLogger(__name__)

PARENT_KEY = "parent"
CONVERSATION_KEY = "conversation_id"
BASE_SELECTOR = "base"

Sink = Callable[[TokenEvent], None]


def pool_of(key: str, gate_share: float) -> Pool:
    """The pool of a rater (or conversation): a stable hash of ``key``, the share ``gate_share`` of which judges."""
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return Pool.GATE if point < gate_share * 2**64 else Pool.TRAIN


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a client asks for; ``pair_allowed`` means it sent no n but takes two answers. ``max_tokens`` None: the default."""

    model: str
    messages: tuple[Message, ...]
    n: int = 1
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    user: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    pair_allowed: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The group to be (without completions) and the version that answers each index."""

    group: Group
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A stored group and, where they were asked for, the token events of each completion."""

    group: Group
    events: tuple[tuple[TokenEvent, ...], ...]


@dataclass(frozen=True, slots=True)
class _Routing:
    """Which versions answer, read in one transaction."""

    champion: int
    challenger: int | None
    pinned: int | None
    duel: Duel | None


class ChatService:
    """Turns chat requests into stored groups; lives in one event loop."""

    def __init__(self, store: Store, sampler: Sampler, config: Config, *, rng: random.Random | None = None) -> None:
        self._store = store
        self._sampler = sampler
        self._config = config
        self._rng = rng or random.SystemRandom()
        self._loading = asyncio.Lock()
        self._used: dict[int, None] = {}  # loaded versions, least recently used first
        self._busy: Counter[int] = Counter()
        self._keep: frozenset[int] = frozenset({BASE_VERSION})
        self._rows: dict[int, Version] = {}  # versions are immutable, so a row once read stays right

    # -- the two ways to answer -----------------------------------------------------------------------------------------

    async def answer(self, request: ChatRequest, *, with_tokens: bool = False) -> Answer:
        """Sample a group, store it durably, and only then give it back.

        Raises InvalidRequestError, NotFoundError (model), EngineError (queue full, engine down), StoreError.
        """
        plan = await self.plan(request)
        events = _Events(len(plan.versions))
        with self._in_use(plan.versions):
            completions = await self._sample(plan, events, events.add if with_tokens else None)
        group = replace(plan.group, completions=completions)
        await asyncio.wrap_future(self._store.submit(lambda c: groups.insert(c, group)))
        return Answer(group, events.by_index())

    async def stream(self, request: ChatRequest) -> AnswerStream:
        """Store the group row, begin to sample, and give back a stream whose first tokens have arrived.

        Raises what ``answer`` raises, so that a refusal still has its own status code.
        """
        plan = await self.plan(request)
        stream = AnswerStream(self, plan)
        await stream.open()
        return stream

    async def plan(self, request: ChatRequest) -> Plan:
        """Decide pool, kind and versions of a request, and encode its prompt."""
        if self._sampler.queued() >= self._config.serve.queue_limit:
            raise EngineError(f"{self._config.serve.queue_limit} requests are waiting; try again in a moment")
        return await asyncio.to_thread(self._plan, request)

    async def version(self, number: int) -> Version:
        """The row of a version; NotFoundError where there is none."""
        if number not in self._rows:
            self._rows[number] = await asyncio.to_thread(self._read_version, number)
        return self._rows[number]

    # -- deciding ---------------------------------------------------------------------------------------------------------

    def _plan(self, request: ChatRequest) -> Plan:
        with self._store.reading() as c:
            routing = self._route(c, request.model)
            parent, parent_index = self._predecessor(c, request)
        self._keep = frozenset({BASE_VERSION, routing.champion, routing.challenger or BASE_VERSION})
        group_id = new_group_id()
        prompt_token_ids = self._sampler.tokens.encode_prompt(request.messages)
        pool = self._pool(request, parent) if routing.pinned is None else Pool.GATE
        count = 2 if request.n == 1 and request.pair_allowed and self._coin(self._config.serve.exposure_rate) else request.n
        kind, answering, duel_id = self._cast(routing, pool, count)
        group = Group(
            group_id=group_id,
            policy=self._config.policy.name,
            kind=kind,
            pool=pool,
            prompt=request.messages,
            completions=(),
            created_at=datetime.now(UTC),
            prompt_token_ids=prompt_token_ids,
            sampling=replace(request.params, max_tokens=self._room(len(prompt_token_ids), request.max_tokens)),
            user=request.user,
            conversation_id=request.metadata.get(CONVERSATION_KEY) or (parent.conversation_id if parent else None) or group_id,
            parent_group_id=parent.group_id if parent else None,
            parent_index=parent_index,
            duel_id=duel_id,
            metadata=dict(request.metadata),
        )
        return Plan(group, answering)

    def _route(self, c: Connection, model: str) -> _Routing:
        name, _, selector = model.partition("@")
        policy = self._config.policy.name
        if name != policy:
            raise NotFoundError(f"the model {model!r} does not exist; this server answers as {policy!r}", param="model")
        champion = versions.alias(c, policy, Alias.CHAMPION) or BASE_VERSION
        challenger = versions.alias(c, policy, Alias.CHALLENGER)
        if "@" in model:
            pinned = self._pinned(c, model, selector, champion, challenger)
            return _Routing(champion, challenger, pinned, None)
        duel = duels.current(c, policy) if challenger is not None else None
        # A rollback in mid-duel leaves a duel whose champion no longer serves: nothing may be added to it.
        live = duel if duel is not None and (duel.champion, duel.challenger) == (champion, challenger) else None
        return _Routing(champion, challenger, None, live)

    def _pinned(self, c: Connection, model: str, selector: str, champion: int, challenger: int | None) -> int:
        by_name = {BASE_SELECTOR: BASE_VERSION, str(Alias.CHAMPION): champion, str(Alias.CHALLENGER): challenger}
        number = by_name.get(selector)
        if number is not None:
            return number
        if selector.isascii() and selector.isdigit() and len(selector) <= 9:
            version = versions.get(c, self._config.policy.name, int(selector))
            if version is not None:
                return version.number
        raise NotFoundError(f"the model {model!r} does not exist; GET /v1/models lists those that do", param="model")

    def _predecessor(self, c: Connection, request: ChatRequest) -> tuple[Group | None, int | None]:
        """The group that the conversation goes on from and the index of the branch that was taken."""
        last = next((m.content for m in reversed(request.messages) if m.role == "assistant"), None)
        named = request.metadata.get(PARENT_KEY)
        if named is not None:
            parent = groups.get(c, named)
            if parent is None or parent.policy != self._config.policy.name:
                raise InvalidRequestError(f"no stored completion {named!r} of this policy", param="metadata.parent")
            return parent, next((i for i, done in enumerate(parent.completions) if done.text == last), None)
        if last is None or request.user is None:
            return None, None
        found = groups.latest_answer(c, self._config.policy.name, request.user, last)
        return (groups.get(c, found[0]), found[1]) if found is not None else (None, None)

    def _pool(self, request: ChatRequest, parent: Group | None) -> Pool:
        """By user, else by conversation: the named one, the predecessor's, or that of the same opening turn."""
        gate_share = self._config.serve.gate_share
        if request.user is not None:
            return pool_of(request.user, gate_share)
        if CONVERSATION_KEY in request.metadata:
            return pool_of(request.metadata[CONVERSATION_KEY], gate_share)
        if parent is not None and parent.user is None:
            return parent.pool
        opening = []
        for message in request.messages:
            opening.append(f"{message.role}\0{message.content}")
            if message.role == "user":
                break
        return pool_of("\0".join(opening), gate_share)

    def _cast(self, routing: _Routing, pool: Pool, n: int) -> tuple[GroupKind, tuple[int, ...], str | None]:
        """Kind, version per index, and duel of a group."""
        if routing.pinned is not None:
            return GroupKind.HELDOUT, (routing.pinned,) * n, None
        if pool is Pool.TRAIN:
            return GroupKind.TRAIN, (routing.champion,) * n, None
        duel = routing.duel
        if n == 2 and duel is not None and self._coin(self._config.serve.duel_share):
            sides = (duel.champion, duel.challenger)
            return GroupKind.DUEL, sides if self._coin(0.5) else sides[::-1], duel.duel_id
        return GroupKind.HELDOUT, (routing.champion,) * n, None

    def _coin(self, share: float) -> bool:
        return self._rng.random() < share

    def _room(self, prompt_tokens: int, wanted: int | None) -> int:
        """Tokens that a completion may have; InvalidRequestError where the prompt alone fills the context."""
        limit = self._sampler.max_context
        if self._config.serve.max_context:
            limit = min(limit, self._config.serve.max_context)
        room = limit - prompt_tokens
        if room < 1:
            raise InvalidRequestError(
                f"the messages have {prompt_tokens} tokens; the model's context of {limit} leaves no room for an answer",
                param="messages",
                code="context_length_exceeded",
            )
        return min(wanted or self._config.serve.max_tokens, room)

    def _read_version(self, number: int) -> Version:
        with self._store.reading() as c:
            version = versions.get(c, self._config.policy.name, number)
        if version is None:
            raise NotFoundError(f"no version {number} of {self._config.policy.name}", param="model")
        return version

    # -- sampling ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _in_use(self, numbers: Iterable[int]) -> Iterator[None]:
        """Versions that are answering are not evicted."""
        held = frozenset(numbers)
        self._busy.update(held)
        try:
            yield
        finally:
            self._busy.subtract(held)

    async def _sample(self, plan: Plan, events: _Events, sink: Sink | None) -> tuple[Completion, ...]:
        """Draw the completions; once more where a version was unloaded between routing and sampling (a duel just closed)."""
        await self._ensure_loaded(plan.versions)
        try:
            return await self._draw(plan, sink)
        except EngineError:
            if events.count or self._sampler.loaded().issuperset(plan.versions):
                raise
        await self._ensure_loaded(plan.versions)
        return await self._draw(plan, sink)

    async def _draw(self, plan: Plan, sink: Sink | None) -> tuple[Completion, ...]:
        ids, params = plan.group.prompt_token_ids, plan.group.sampling
        pending: list[Future[tuple[Completion, ...]]] = []
        try:
            if plan.group.kind is GroupKind.DUEL:
                for index, number in enumerate(plan.versions):
                    on_token = _at_index(sink, index) if sink is not None else None
                    pending.append(self._sampler.sample(SampleRequest(ids, number, 1, params, on_token)))
            else:
                request = SampleRequest(ids, plan.versions[0], len(plan.versions), params, sink)
                pending.append(self._sampler.sample(request))
            parts = await asyncio.gather(*map(asyncio.wrap_future, pending))
        finally:
            for future in pending:
                future.cancel()  # does nothing where it is done; stops the sampling where the client or the other side is gone
        return tuple(completion for part in parts for completion in part)

    async def _ensure_loaded(self, numbers: tuple[int, ...]) -> None:
        for number in dict.fromkeys(numbers):
            self._used.pop(number, None)
            self._used[number] = None
        if self._sampler.loaded().issuperset(numbers):
            return
        async with self._loading:
            for number in dict.fromkeys(numbers):
                if number not in self._sampler.loaded():
                    await asyncio.to_thread(self._sampler.load, await self.version(number))
            await self._evict(frozenset(numbers))

    async def _evict(self, wanted: frozenset[int]) -> None:
        """Unload the least recently used versions beyond ``policy.max_loaded``; never base, champion, challenger or a busy one."""
        loaded = self._sampler.loaded()
        spare = len(loaded) - self._config.policy.max_loaded
        by_age = sorted(loaded, key=lambda number: list(self._used).index(number) if number in self._used else -1)
        for number in by_age:
            if spare <= 0:
                return
            if number in wanted or number in self._keep or self._busy[number] > 0:
                continue
            await asyncio.to_thread(self._sampler.unload, number)
            self._used.pop(number, None)
            spare -= 1


class AnswerStream:
    """A group on its way: token batches, then ``finish``; ``abandon`` where the client went away before."""

    def __init__(self, service: ChatService, plan: Plan) -> None:
        self.plan = plan
        self._service = service
        self._store = service._store
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenEvent | None] = asyncio.Queue()
        self._events = _Events(len(plan.versions))
        self._first: list[TokenEvent] = []
        self._task: asyncio.Task[tuple[Completion, ...]] | None = None
        self._closed = False

    @property
    def group(self) -> Group:
        return self.plan.group

    async def open(self) -> None:
        """Commit the group row while sampling begins, and wait for the first tokens (or the failure) to come."""
        row = asyncio.wrap_future(self._store.submit(lambda c: groups.insert(c, self.group)))
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
        completions = await self._task
        self._closed = True  # from here on the group is whole, also when the client goes away before the last chunk
        await asyncio.wrap_future(self._store.submit(lambda c: groups.finish(c, self.group.group_id, completions)))
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
        self._store.submit(lambda c: groups.finish(c, self.group.group_id, completions)).add_done_callback(_log_failure)

    async def _sampling(self) -> tuple[Completion, ...]:
        with self._service._in_use(self.plan.versions):
            return await self._service._sample(self.plan, self._events, self._sink)

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


class _Events:
    """Token events by completion index; filled from the sampler's thread."""

    def __init__(self, n: int) -> None:
        self._by_index: tuple[list[TokenEvent], ...] = tuple([] for _ in range(n))
        self.count = 0

    def add(self, event: TokenEvent) -> None:
        self._by_index[event.index].append(event)
        self.count += 1

    def by_index(self) -> tuple[tuple[TokenEvent, ...], ...]:
        return tuple(tuple(events) for events in self._by_index)


def _at_index(sink: Sink, index: int) -> Sink:
    """In a duel each side is a request of its own, whose only completion has index 0."""
    return lambda event: sink(replace(event, index=index))


def _log_failure(future: Future[None]) -> None:
    error = future.exception()
    if error is not None:
        logger.error("an abandoned group could not be closed: %s", error)
