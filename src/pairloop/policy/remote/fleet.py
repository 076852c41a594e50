"""All replicas of one policy: who gets a request, what happens when one fails it, and which adapters each must have.

Everything here runs in the policy's event loop. A replica gets traffic only in the state ``ready``: its base was compared with
the trainer's forward pass, and every wanted adapter was loaded and probed on it. One that goes away is looked at until it comes
back, and then has to pass all that again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress

from pairloop.errors import EngineError, InvalidRequestError, ModelError, PairloopError
from pairloop.policy.protocols import RESPONSE_FORMAT, ReplicaState, SampleRequest, Tokens, TokenSequence
from pairloop.policy.remote import probe
from pairloop.policy.remote.assembly import Assembly
from pairloop.policy.remote.replica import Adapter, Replica
from pairloop.policy.remote.wire import GarbageError, MissingAdapterError, Served, UnavailableError, completion_body, read_chunk
from pairloop.types import BASE_VERSION, Completion

ATTEMPTS = 4
"""How often one request is tried, as long as nothing of it was told."""
BACK_OFF_S = 0.05
"""Pause before the second attempt; it doubles, with jitter."""
LONGEST_LOOK_S = 60.0
"""Longest pause between two looks at a replica that is refused."""

Score = Callable[[int, Sequence[TokenSequence]], list[tuple[float, ...]]]
log = logging.getLogger(__name__)


class Fleet:
    """``score`` gives this process's own log-probs and may block; ``max_context`` = 0 takes the replicas' own limit."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        tokens: Tokens,
        score: Score,
        *,
        dtype: str,
        vocab_size: int,
        poll_s: float,
        max_context: int = 0,
        rng: random.Random | None = None,
    ) -> None:
        self.replicas = tuple(replicas)
        self.max_context = max_context
        self._tokens = tokens
        self._score = score
        self._dtype = dtype
        self._vocab_size = vocab_size
        self._poll_s = poll_s
        self._rng = rng or random.Random()
        self._wanted: dict[int, Adapter] = {}
        self._administration = asyncio.Lock()
        """Held while adapters are loaded, unloaded or probed: no replica becomes ready in the middle of a deployment."""
        self._look_now = {replica.url: asyncio.Event() for replica in replicas}
        self._base_answers: dict[str, Completion] = {}
        self._looked: set[str] = set()
        self._changed = asyncio.Event()

    # -- requests ---------------------------------------------------------------------------------------------------------

    async def complete(self, request: SampleRequest) -> tuple[Completion, ...]:
        """The completions, of the first replica that gives them. EngineError where none can, or one broke after it began."""
        adapter = self._wanted.get(request.version)
        if adapter is None and request.version != BASE_VERSION:
            raise EngineError(f"version {request.version} is not loaded")
        tried: set[str] = set()
        problem: EngineError | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(BACK_OFF_S * 2 ** (attempt - 1) * self._rng.uniform(0.5, 1.5))
            replica = self._choose(tried)
            if replica is None:
                break
            tried.add(replica.url)
            assembly = Assembly(request, self._tokens)
            try:
                return await self._attempt(replica, request, assembly, adapter)
            except EngineError as error:
                problem = error
                log.info("attempt %d of a request failed: %s", attempt + 1, error)
                if assembly.told:
                    raise EngineError(f"an answer broke off in the middle: {error}") from error
        raise problem if problem is not None else EngineError(f"no engine takes requests: {self._problems()}")

    def _choose(self, tried: set[str]) -> Replica | None:
        """The replica with the fewest requests in flight, before those that failed this one; by lot among equals."""
        open_ones = [replica for replica in self.replicas if replica.takes_requests]
        return min(open_ones, key=lambda r: (r.url in tried, r.outstanding, self._rng.random()), default=None)

    async def _attempt(
        self, replica: Replica, request: SampleRequest, assembly: Assembly, adapter: Adapter | None
    ) -> tuple[Completion, ...]:
        with self._judged(replica, request):
            body = completion_body(
                request,
                adapter.name if adapter is not None else replica.base,
                n=assembly.asked,
                eos_token_ids=self._tokens.eos_token_ids,
            )
            try:
                async with aclosing(replica.stream(body)) as events:
                    async for data in events:
                        for piece in read_chunk(data, request, n=assembly.asked, vocab_size=self._vocab_size):
                            assembly.add(piece)
            except EngineError:
                if not assembly.is_whole:
                    raise
            return assembly.completions(recorded=replica.recorded)

    @contextmanager
    def _judged(self, replica: Replica, request: SampleRequest) -> Iterator[None]:
        """Counts a request as in flight at ``replica``, and its end for or against it."""
        trial = replica.breaker.begin()
        replica.outstanding += 1
        try:
            yield
        except MissingAdapterError as error:
            if trial:
                replica.breaker.gave_up()
            if replica.state is ReplicaState.READY:
                replica.move(ReplicaState.JOINING, str(error))
            self._look_now[replica.url].set()
            raise
        except (UnavailableError, GarbageError) as error:
            replica.failed(error)
            self._look_now[replica.url].set()
            raise
        except InvalidRequestError as error:
            replica.breaker.succeeded()
            if error.param is None and request.response_format is not None:
                error.param = RESPONSE_FORMAT
            raise
        except BaseException:
            if trial:
                replica.breaker.gave_up()
            raise
        else:
            replica.breaker.succeeded()
        finally:
            replica.outstanding -= 1

    def _problems(self) -> str:
        described = ((r.url, r.state, r.breaker.state, f": {r.problem}" if r.problem else "") for r in self.replicas)
        return "; ".join(f"{url} is {state}, its circuit {circuit}{problem}" for url, state, circuit, problem in described)

    # -- adapters ---------------------------------------------------------------------------------------------------------

    async def load(self, adapter: Adapter) -> None:
        """Load and probe an adapter on every ready replica; only then may anything be sent to it.

        Where a replica refuses it or fails the probe nothing has changed: ModelError or EngineError. One that goes away
        meanwhile is left out: it has to pass the same when it comes back.
        """
        async with self._administration:
            ready = [replica for replica in self.replicas if replica.state is ReplicaState.READY]
            problems = await asyncio.gather(*(self._try(self._put(replica, adapter)) for replica in ready))
            for replica, problem in zip(ready, problems, strict=True):
                if isinstance(problem, UnavailableError) and problem.gone:
                    replica.failed(problem)
                    self._look_now[replica.url].set()
            fatal = next((p for p in problems if p is not None and not getattr(p, "gone", False)), None)
            if fatal is not None or all(problem is not None for problem in problems):
                await asyncio.gather(*(self._try(r.unload(adapter.name)) for r in ready if r.state is ReplicaState.READY))
                raise fatal or EngineError(f"no engine could load {adapter.name}: {self._problems()}")
            self._wanted[adapter.number] = adapter

    async def unload(self, number: int) -> None:
        """Take an adapter off every replica that answers; the others lose it by going away."""
        async with self._administration:
            adapter = self._wanted.pop(number, None)
            if adapter is not None:
                ready = [replica for replica in self.replicas if replica.state is ReplicaState.READY]
                for problem in await asyncio.gather(*(self._try(replica.unload(adapter.name)) for replica in ready)):
                    if problem is not None:
                        log.warning("%s could not be unloaded: %s", adapter.name, problem)

    @staticmethod
    async def _try(work: Awaitable[None]) -> PairloopError | None:
        try:
            await work
        except PairloopError as error:
            return error
        return None

    async def _put(self, replica: Replica, adapter: Adapter) -> None:
        await replica.load(adapter)
        served = await replica.look()
        if adapter.name not in served.adapters:
            raise EngineError(f"engine {replica.url} took {adapter.name}, but does not list it on {served.base}")
        await self._probe(replica, adapter)

    async def _probe(self, replica: Replica, adapter: Adapter) -> None:
        assert replica.agreement is not None, "the base is measured before any adapter"
        request = probe.probe_request(self._tokens, adapter.number)
        (answer,) = await self._ask(replica, request, adapter)
        known = [TokenSequence(request.prompt_token_ids, answer.token_ids)]
        own, own_base = [(await asyncio.to_thread(self._score, number, known))[0] for number in (adapter.number, BASE_VERSION)]
        base = self._base_answers[replica.url]
        try:
            probe.verdict(answer.logps, (base.token_ids, base.logps), answer.token_ids, own, own_base, replica.agreement)
        except EngineError as error:
            raise EngineError(f"engine {replica.url} did not load {adapter.name} as it is: it {error}") from error

    async def _ask(self, replica: Replica, request: SampleRequest, adapter: Adapter | None) -> tuple[Completion, ...]:
        """One attempt at one replica, whatever its state, with log-probs."""
        assembly = Assembly(request, self._tokens)
        model = adapter.name if adapter is not None else replica.base
        body = completion_body(request, model, n=assembly.asked, eos_token_ids=self._tokens.eos_token_ids)
        async with aclosing(replica.stream(body)) as events:
            async for data in events:
                for piece in read_chunk(data, request, n=assembly.asked, vocab_size=self._vocab_size):
                    assembly.add(piece)
        return assembly.completions(recorded=True)

    # -- coming and going -------------------------------------------------------------------------------------------------

    async def watch(self, replica: Replica) -> None:
        """Look at one replica again and again, at once when a request failed there; never returns."""
        pause_s = 0.0
        event = self._look_now[replica.url]
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), pause_s)
            event.clear()
            await self._look(replica)
            self._looked.add(replica.url)
            self._changed.set()
            refused = replica.state is ReplicaState.REFUSED
            pause_s = min(2 * max(pause_s, self._poll_s), LONGEST_LOOK_S) if refused else self._poll_s

    async def settled(self) -> None:
        """Until every replica was looked at, and one is ready or all are refused."""
        while True:
            states = {replica.state for replica in self.replicas}
            if len(self._looked) == len(self.replicas) and (ReplicaState.READY in states or states == {ReplicaState.REFUSED}):
                return
            self._changed.clear()
            await self._changed.wait()

    async def _look(self, replica: Replica) -> None:
        try:
            served = await replica.look()
            if replica.state is ReplicaState.READY and self._is_whole(served):
                return
            async with self._administration:
                await self._admit(replica, served)
        except (UnavailableError, GarbageError, MissingAdapterError) as error:
            replica.move(ReplicaState.DOWN, str(error))
        except PairloopError as error:
            replica.move(ReplicaState.REFUSED, str(error))
        except Exception as error:
            log.exception("looking at engine %s failed", replica.url)
            replica.move(ReplicaState.REFUSED, f"{type(error).__name__}: {error}")

    def _is_whole(self, served: Served) -> bool:
        return served.adapters.issuperset(adapter.name for adapter in self._wanted.values())

    async def _admit(self, replica: Replica, served: Served) -> None:
        """From unknown to ready: the context, the base's agreement, every wanted adapter."""
        replica.move(ReplicaState.JOINING)
        if self.max_context > served.max_model_len:
            raise ModelError(
                f"engine {replica.url} has --max-model-len {served.max_model_len}, and {self.max_context} are served: "
                "give all replicas the same, or set serve.max_context"
            )
        if replica.agreement is None:
            await self._measure(replica)
        for adapter in list(self._wanted.values()):
            await self._put(replica, adapter)
        if not self.max_context:
            self.max_context = served.max_model_len
        replica.breaker.reset()
        replica.move(ReplicaState.READY)

    async def _measure(self, replica: Replica) -> None:
        """Compare the replica's log-probs of its base with this process's own."""
        requests = probe.agreement_requests(self._tokens)
        theirs = [await self._ask(replica, request, None) for request in requests]
        ours = []
        for request, group in zip(requests, theirs, strict=True):
            sequences = [TokenSequence(request.prompt_token_ids, completion.token_ids) for completion in group]
            ours.append(await asyncio.to_thread(self._score, BASE_VERSION, sequences))
        try:
            report = probe.measure(theirs, ours, self._dtype)
        except ModelError as error:
            raise ModelError(f"engine {replica.url} {error}") from error
        (self._base_answers[replica.url],) = await self._ask(replica, probe.probe_request(self._tokens, BASE_VERSION), None)
        replica.agreement = report
        found = f"{report['max_token_delta']:.2g} nats at most (allowed {report['token_tolerance']:.2g})"
        if report["passed"]:
            log.info("engine %s agrees with the trainer: %s; recorded log-probs are the reference", replica.url, found)
        else:
            log.warning(
                "engine %s does not agree with the trainer: %s, margins %.2g (allowed %.2g); its completions are stored "
                "without log-probs, and the trainer scores them itself",
                *(replica.url, found, report["h_p99"], report["h_tolerance"]),
            )
