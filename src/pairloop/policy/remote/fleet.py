"""All replicas of one policy: who gets a request, and what happens when one fails it. Runs in the policy's event loop."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager

from pairloop.errors import EngineError, InvalidRequestError
from pairloop.policy.protocols import RESPONSE_FORMAT, ReplicaState, SampleRequest, Tokens
from pairloop.policy.remote.assembly import Assembly
from pairloop.policy.remote.replica import Adapter, Replica
from pairloop.policy.remote.wire import GarbageError, MissingAdapterError, ReplicaUnavailableError, completion_body, read_chunk
from pairloop.types import BASE_VERSION, Completion

ATTEMPTS = 4
"""How often one request is tried, as long as nothing of it was told."""
BACK_OFF_S = 0.05
"""Pause before the second attempt; it doubles, with jitter."""

log = logging.getLogger(__name__)


class Fleet:
    """The replicas and the adapters that each of them has; only those that are ready get requests."""

    def __init__(
        self, replicas: Sequence[Replica], tokens: Tokens, *, vocab_size: int, rng: random.Random | None = None
    ) -> None:
        self.replicas = tuple(replicas)
        self.adapters: dict[int, Adapter] = {}
        """By version number: those that were loaded and probed on every ready replica."""
        self._tokens = tokens
        self._vocab_size = vocab_size
        self._rng = rng or random.Random()

    async def complete(self, request: SampleRequest) -> tuple[Completion, ...]:
        """The completions, of the first replica that gives them. EngineError where none can, or one broke after it began."""
        adapter = self.adapters.get(request.version)
        if adapter is None and request.version != BASE_VERSION:
            raise EngineError(f"version {request.version} is not loaded")
        tried: set[str] = set()
        problem: EngineError | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(BACK_OFF_S * 2 ** (attempt - 1) * self._rng.uniform(0.5, 1.5))
            replica = self._choose(tried)
            if replica is None and any(r.state is ReplicaState.JOINING for r in self.replicas):
                continue  # it may be ready in a moment
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
        raise problem if problem is not None else EngineError(f"no engine takes requests: {self.problems()}")

    def _choose(self, tried: set[str]) -> Replica | None:
        """The replica with the fewest requests in flight, before those that failed this one; by lot among equals."""
        open_ones = [replica for replica in self.replicas if replica.takes_requests]
        return min(open_ones, key=lambda r: (r.url in tried, r.outstanding, self._rng.random()), default=None)

    async def _attempt(
        self, replica: Replica, request: SampleRequest, assembly: Assembly, adapter: Adapter | None
    ) -> tuple[Completion, ...]:
        with self._judged(replica, request):
            try:
                await self.stream(replica, request, assembly, adapter)
            except EngineError:
                if not assembly.is_whole:  # what comes after the last token is of no interest
                    raise
            return assembly.completions(recorded=replica.recorded)

    async def stream(self, replica: Replica, request: SampleRequest, assembly: Assembly, adapter: Adapter | None) -> None:
        """One attempt at one replica, whatever its state."""
        model = adapter.name if adapter is not None else replica.base
        body = completion_body(request, model, n=assembly.asked, eos_token_ids=self._tokens.eos_token_ids)
        async with aclosing(replica.stream(body)) as events:
            async for data in events:
                for piece in read_chunk(data, request, n=assembly.asked, vocab_size=self._vocab_size):
                    assembly.add(piece)

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
            replica.look_now.set()
            raise
        except (ReplicaUnavailableError, GarbageError) as error:
            replica.failed(error)
            replica.look_now.set()
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

    def problems(self) -> str:
        described = ((r.name, r.state, r.breaker.state, f": {r.problem}" if r.problem else "") for r in self.replicas)
        return "; ".join(f"{name} is {state}, its circuit {circuit}{problem}" for name, state, circuit, problem in described)
