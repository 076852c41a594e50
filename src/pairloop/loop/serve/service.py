"""Sampling: loads what a plan needs, draws the completions, and stores the group before it is answered."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import Config
from pairloop.errors import EngineError, NotFoundError, PairloopError
from pairloop.loop.serve.plan import Plan, Planner, shadow_of
from pairloop.loop.serve.recorder import Recorder
from pairloop.loop.serve.request import ChatRequest
from pairloop.loop.serve.stopwatch import Took, sampling
from pairloop.loop.serve.stream import Answer, AnswerStream, Events, Lockstep, Sink, completions_as_stored
from pairloop.policy.protocols import Sampler, SampleRequest
from pairloop.store import Store, groups, removed, stored, versions
from pairloop.store.waiting import awaitable
from pairloop.types import BASE_VERSION, Completion, Group, GroupKind, Version

STOPPING = "the server is stopping; send the request again"
logger = logging.getLogger(__name__)

SHADOW_ROOM = 4
"""Requests at the sampler from which on no shadow is cast: those who wait come first."""
ROWS = 64
"""Versions whose rows are kept in mind."""


class ChatService:
    """Turns chat requests into stored groups; lives in one event loop."""

    def __init__(self, store: Store, sampler: Sampler, config: Config, *, rng: random.Random | None = None) -> None:
        self._store = store
        self._sampler = sampler
        self._config = config
        self._planner = Planner(store, sampler, config, rng or random.SystemRandom())
        self._loading = asyncio.Lock()
        self._used: dict[int, None] = {}  # loaded versions, least recently used first
        self._busy: Counter[int] = Counter()
        self._keep: frozenset[int] = frozenset({BASE_VERSION})
        self._drawing: set[asyncio.Future[list[tuple[Completion, ...]]]] = set()
        self._is_cut = False
        self.recorder = Recorder(store, sampler, config.policy.name, config.deploy)
        self._shadows: set[asyncio.Task[None]] = set()
        self._rows: dict[int, Version] = {}  # versions are immutable, so a row once read stays right

    # -- the two ways to answer -----------------------------------------------------------------------------------------

    async def answer(self, request: ChatRequest, *, with_tokens: bool = False) -> Answer:
        """Sample a group, store it durably, and only then give it back.

        Raises InvalidRequestError, NotFoundError (model), EngineError (queue full, engine down), StoreError.
        """
        plan = await self.plan(request)
        events = Events(len(plan.versions))
        completions = await self._sample(plan, events, events.add if with_tokens else None)
        group = replace(plan.stored, completions=await completions_as_stored(self._store, plan, completions))

        def write(c: Connection) -> None:
            groups.insert(c, group)
            stored.insert(c, group, is_listed=plan.asked.is_listed)

        await awaitable(self._store.submit(write, admitted=True))  # it was let in before it was sampled
        self._cast_shadow(plan)
        return Answer(replace(plan.group, completions=completions), events.by_index())

    async def stream(self, request: ChatRequest) -> AnswerStream:
        """Store the group row, begin to sample, and give back a stream whose first tokens have arrived.

        Raises what ``answer`` raises, so that a refusal still has its own status code.
        """
        plan = await self.plan(request)
        stream = AnswerStream(self._store, plan, self._sample, self._cast_shadow)
        await stream.open()
        return stream

    async def replay(self, group: Group, number: int) -> Completion:
        """What version ``number`` says to the same prompt, drawn the same way. Nothing is stored, and no guard counts it.

        Raises NotFoundError (version), InvalidRequestError (the prompt), EngineError.
        """
        self._refuse_where_full()
        await self.version(number)
        ids = group.prompt_token_ids or await asyncio.to_thread(self._sampler.tokens.encode_prompt, group.prompt)
        if self._is_cut:
            raise EngineError(STOPPING)
        with self._in_use((number,)):
            await self._load((number,))
            ((completion,),) = await self._drawn([self._sampler.sample(SampleRequest(ids, number, 1, group.sampling))])
        return completion

    def _refuse_where_full(self) -> None:
        if self._sampler.queued() >= self._config.serve.queue_limit:
            raise EngineError(f"{self._config.serve.queue_limit} requests are waiting; try again in a moment")

    async def plan(self, request: ChatRequest) -> Plan:
        """Decide pool, kind and versions of a request, and encode its prompt."""
        self._refuse_where_full()
        plan = await asyncio.to_thread(self._planner.plan, request)
        self._keep = plan.keep
        return plan

    async def version(self, number: int) -> Version:
        """The row of a version; NotFoundError where there is none."""
        row = self._rows.get(number)
        if row is None:
            row = self._rows[number] = await asyncio.to_thread(self._read_version, number)
            if len(self._rows) > ROWS:
                del self._rows[next(iter(self._rows))]
        return row

    def cut(self) -> int:
        """End all sampling: those who wait get an EngineError, and nothing is sampled any more. How many were cut off."""
        self._is_cut = True
        for drawn in self._drawing:
            drawn.cancel()
        return len(self._drawing)

    def _read_version(self, number: int) -> Version:
        with self._store.reading() as c:
            version = versions.get(c, self._config.policy.name, number)
            is_gone = version is not None and removed.is_removed(c, version.path)
        if version is None:
            raise NotFoundError(f"no version {number} of {self._config.policy.name}", param="model")
        if is_gone:
            raise NotFoundError(f"the weights of {version.name} were removed (privacy.keep_versions)", param="model")
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

    async def _sample(self, plan: Plan, events: Events, sink: Sink | None) -> tuple[Completion, ...]:
        """Draw the completions; once more where a version was unloaded between routing and sampling (a duel just closed)."""
        with self._in_use(plan.versions):
            await self._ensure_loaded(plan.versions, of=plan)
            try:
                return await self._draw(plan, sink)
            except EngineError:
                if events.count or self._sampler.loaded().issuperset(plan.versions):
                    raise
            await self._ensure_loaded(plan.versions, of=plan)
            return await self._draw(plan, sink)

    async def _draw(self, plan: Plan, sink: Sink | None) -> tuple[Completion, ...]:
        asked = SampleRequest(
            plan.group.prompt_token_ids,
            plan.versions[0],
            len(plan.versions),
            plan.group.sampling,
            sink,
            plan.asked.top_logprobs,
            plan.asked.response_format,
        )
        if self._is_cut:
            raise EngineError(STOPPING)
        pending: list[Future[tuple[Completion, ...]]] = []
        took = Took(plan.asked.came_at)
        try:
            if plan.group.kind is GroupKind.DUEL:
                sides = Lockstep(sink, len(plan.versions)) if sink is not None else None
                for index, number in enumerate(plan.versions):
                    on_token = partial(sides.add, index) if sides is not None else None
                    pending.append(await self._submit(replace(asked, version=number, n=1, on_token=on_token), plan, took))
                    if sides is not None:
                        pending[-1].add_done_callback(partial(sides.end, index))
            else:
                pending.append(await self._submit(asked, plan, took))
            with sampling():
                parts = await self._drawn(pending)
        finally:
            for future in pending:
                future.cancel()  # does nothing where it is done; stops the sampling where the client or the other side is gone
        return took.noted(zip(pending, parts, strict=True))

    async def _drawn(self, pending: Iterable[Future[tuple[Completion, ...]]]) -> list[tuple[Completion, ...]]:
        drawn = asyncio.gather(*map(asyncio.wrap_future, pending))
        self._drawing.add(drawn)
        try:
            return await drawn
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_cut and (task is None or not task.cancelling()):  # not its client that went away
                raise EngineError(STOPPING) from None
            raise
        finally:
            self._drawing.discard(drawn)

    async def _submit(self, request: SampleRequest, plan: Plan, took: Took) -> Future[tuple[Completion, ...]]:
        """Queue it; a response format is compiled first, which would hold up the other requests here."""
        if request.response_format is None:
            answer = self._sampler.sample(request)
        else:
            answer = await asyncio.to_thread(self._sampler.sample, request)
        answer.add_done_callback(took.ended)
        if plan.is_live:
            self.recorder.follow(
                request.version,
                plan.witness,
                answer,
                is_short=request.params.max_tokens < self._config.serve.max_tokens,
                has_stop=bool(plan.asked.params.stop),
                is_unseen=plan.group.kind is GroupKind.SHADOW,
            )
        return answer

    def _cast_shadow(self, plan: Plan) -> None:
        """Once the client has its answer: have the plan's shadow answer, too, if the sampler has room. Nobody waits for it."""
        if plan.shadow is not None and self._sampler.queued() < SHADOW_ROOM and len(self._shadows) < SHADOW_ROOM:
            task = asyncio.create_task(self._answer_unseen(shadow_of(plan, plan.shadow)))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def shadows_cast(self) -> None:
        """Returns when those on their way have come."""
        await asyncio.gather(*self._shadows)

    async def _answer_unseen(self, plan: Plan) -> None:
        try:
            completions = await completions_as_stored(self._store, plan, await self._sample(plan, Events(1), None))
            group = replace(plan.stored, completions=completions)
            faults.reach("shadow.before_record")
            await asyncio.wrap_future(self._store.submit(lambda c: groups.insert(c, group)))
            faults.reach("shadow.recorded")
        except PairloopError as error:  # the recorder has counted it, and the request that cast this shadow is answered
            logger.info("no answer in the shadow by version %d: %s", plan.versions[0], error)

    async def _ensure_loaded(self, numbers: tuple[int, ...], of: Plan) -> None:
        """Load what is missing; in the recorder's eyes a version that cannot be loaded fails its request."""
        try:
            await self._load(numbers)
        except PairloopError as error:
            if of.is_live:
                for number in set(numbers) - self._sampler.loaded():
                    self.recorder.failed(number, of.witness, error, is_unseen=of.group.kind is GroupKind.SHADOW)
            raise

    async def _load(self, numbers: tuple[int, ...]) -> None:
        for number in dict.fromkeys(numbers):
            self._used.pop(number, None)
            self._used[number] = None
        loaded = self._sampler.loaded()
        # A promotion leaves its old champion loaded: it goes with the next request (where another one loads, with that one).
        crowded = len(loaded) > self._config.policy.max_loaded and not self._loading.locked()
        if loaded.issuperset(numbers) and not crowded:
            return
        async with self._loading:
            for number in dict.fromkeys(numbers):
                if number not in self._sampler.loaded():
                    await asyncio.to_thread(self._sampler.load, await self.version(number))
            await self._evict(frozenset(numbers))

    async def _evict(self, wanted: frozenset[int]) -> None:
        """Unload the least recently used beyond ``policy.max_loaded``; never what a plan keeps, nor a busy one.

        Versions that never answered here go last. Those among them that are newer than champion and challenger stay: the loop
        loaded them, to measure or to probe them, and unloads them where they fail.
        """
        loaded = self._sampler.loaded()
        spare = len(loaded) - self._config.policy.max_loaded
        answered = [number for number in self._used if number in loaded]
        others = sorted(number for number in loaded if number not in self._used and number < max(self._keep))
        for number in (*answered, *others):
            if spare <= 0:
                return
            if number in wanted or number in self._keep or self._busy[number] > 0:
                continue
            self._used.pop(number, None)
            await asyncio.to_thread(self._sampler.unload, number)
            spare -= 1
