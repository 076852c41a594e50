"""Which adapters every replica has, and which replicas are fit for traffic. Runs in the policy's event loop.

A replica becomes ready when its base was compared with the trainer's forward pass, and every adapter was loaded and probed on
it. One that goes away is looked at until it comes back, and then has to pass all that again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from pairloop.errors import EngineError, ModelError, PairloopError
from pairloop.policy.protocols import ReplicaState, SampleRequest, Tokens, TokenSequence
from pairloop.policy.remote import probe
from pairloop.policy.remote.assembly import Assembly
from pairloop.policy.remote.fleet import Fleet
from pairloop.policy.remote.replica import Adapter, Replica
from pairloop.policy.remote.wire import GarbageError, MissingAdapterError, ReplicaUnavailableError, Served
from pairloop.types import BASE_VERSION, Completion

LONGEST_LOOK_S = 60.0
"""Longest pause between two looks at a replica that is refused."""

Score = Callable[[int, Sequence[TokenSequence]], list[tuple[float, ...]]]
log = logging.getLogger(__name__)


class Keeper:
    """``score`` gives this process's own log-probs and may block; ``max_context`` = 0 takes that of the first replica."""

    def __init__(self, fleet: Fleet, tokens: Tokens, score: Score, *, dtype: str, poll_s: float, max_context: int = 0) -> None:
        self.max_context = max_context
        self._fleet = fleet
        self._tokens = tokens
        self._score = score
        self._dtype = dtype
        self._poll_s = poll_s
        self._administration = asyncio.Lock()
        """Held while adapters are loaded, unloaded or probed: no replica becomes ready in the middle of a deployment."""
        self._base_answers: dict[str, Completion] = {}
        self._looked: set[str] = set()
        self._changed = asyncio.Event()

    async def load(self, adapter: Adapter) -> None:
        """Load and probe an adapter on every ready replica; only then may anything be sent to it.

        Where a replica refuses it or fails the probe nothing has changed: ModelError or EngineError. One that goes away
        meanwhile is left out: it has to pass the same when it comes back.
        """
        async with self._administration:
            ready = [replica for replica in self._fleet.replicas if replica.state is ReplicaState.READY]
            problems = await asyncio.gather(*(self._try(self._put(replica, adapter)) for replica in ready))
            for replica, problem in zip(ready, problems, strict=True):
                if isinstance(problem, ReplicaUnavailableError) and problem.gone:
                    replica.failed(problem)
                    replica.look_now.set()
            fatal = next((p for p in problems if p is not None and not getattr(p, "gone", False)), None)
            if fatal is not None or all(problem is not None for problem in problems):
                await asyncio.gather(*(self._try(r.unload(adapter.name)) for r in ready if r.state is ReplicaState.READY))
                raise fatal or EngineError(f"no engine could load {adapter.name}: {self._fleet.problems()}")
            self._fleet.adapters[adapter.number] = adapter

    async def unload(self, number: int) -> None:
        """Take an adapter off every replica that answers; the others lose it by going away."""
        async with self._administration:
            adapter = self._fleet.adapters.pop(number, None)
            if adapter is not None:
                ready = [replica for replica in self._fleet.replicas if replica.state is ReplicaState.READY]
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
            raise EngineError(f"{replica.name} took {adapter.name}, but does not list it on {served.base}")
        await self._probe(replica, adapter)

    async def _probe(self, replica: Replica, adapter: Adapter) -> None:
        report = replica.agreement
        if report is None:
            raise ReplicaUnavailableError(f"{replica.name} went away", gone=True)
        request = probe.probe_request(self._tokens, adapter.number)
        (answer,) = await self._ask(replica, request, adapter)
        known = [TokenSequence(request.prompt_token_ids, answer.token_ids)]
        own, own_base = [(await asyncio.to_thread(self._score, number, known))[0] for number in (adapter.number, BASE_VERSION)]
        base = self._base_answers[replica.url]
        try:
            probe.verdict(answer.logps, (base.token_ids, base.logps), answer.token_ids, own, own_base, report)
        except EngineError as error:
            raise EngineError(f"{replica.name} did not load {adapter.name} as it is: it {error}") from error

    async def _ask(self, replica: Replica, request: SampleRequest, adapter: Adapter | None) -> tuple[Completion, ...]:
        assembly = Assembly(request, self._tokens)
        await self._fleet.stream(replica, request, assembly, adapter)
        return assembly.completions(recorded=True)

    # -- coming and going -------------------------------------------------------------------------------------------------

    async def watch(self, replica: Replica) -> None:
        """Look at one replica again and again, at once when a request failed there; never returns."""
        pause_s = 0.0
        event = replica.look_now
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
            states = {replica.state for replica in self._fleet.replicas}
            if len(self._looked) == len(self._fleet.replicas) and (
                ReplicaState.READY in states or states == {ReplicaState.REFUSED}
            ):
                return
            self._changed.clear()
            await self._changed.wait()

    async def _look(self, replica: Replica) -> None:
        try:
            served = await replica.look()
            if replica.state is ReplicaState.READY and self._is_whole(served):
                return
            async with self._administration:
                served = await replica.look()  # an adapter may have been loaded between the first look and now
                if replica.state is not ReplicaState.READY or not self._is_whole(served):
                    await self._admit(replica, served)
        except (ReplicaUnavailableError, GarbageError, MissingAdapterError) as error:
            replica.move(ReplicaState.DOWN, str(error))
        except PairloopError as error:
            replica.move(ReplicaState.REFUSED, str(error))
        except Exception as error:
            log.exception("looking at %s failed", replica.name)
            replica.move(ReplicaState.REFUSED, f"{type(error).__name__}: {error}")

    def _is_whole(self, served: Served) -> bool:
        return served.adapters.issuperset(adapter.name for adapter in self._fleet.adapters.values())

    async def _admit(self, replica: Replica, served: Served) -> None:
        """From unknown to ready: the context, the base's agreement, every wanted adapter."""
        replica.move(ReplicaState.JOINING)
        if self.max_context > served.max_model_len:
            raise ModelError(
                f"{replica.name} has --max-model-len {served.max_model_len}, and {self.max_context} are served: "
                "give all replicas the same, or set serve.max_context"
            )
        if replica.agreement is None:
            await self._measure(replica)
        for adapter in list(self._fleet.adapters.values()):
            await self._put(replica, adapter)
        if not self.max_context:
            self.max_context = served.max_model_len
        if replica.state is not ReplicaState.JOINING:
            raise ReplicaUnavailableError(f"{replica.name} went away while it joined", gone=True)
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
            raise ModelError(f"{replica.name} {error}") from error
        (self._base_answers[replica.url],) = await self._ask(replica, probe.probe_request(self._tokens, BASE_VERSION), None)
        replica.agreement = report
        found = f"{report['max_token_delta']:.2g} nats at most (allowed {report['token_tolerance']:.2g})"
        if report["passed"]:
            log.info("%s agrees with the trainer: %s; recorded log-probs are the reference", replica.name, found)
        else:
            log.warning(
                "%s does not agree with the trainer: %s, margins %.2g (allowed %.2g); its completions are stored "
                "without log-probs, and the trainer scores them itself",
                *(replica.name, found, report["h_p99"], report["h_tolerance"]),
            )
