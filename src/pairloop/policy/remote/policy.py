"""What the house sees of the engines behind HTTP: a `Policy` whose requests run in an event loop of its own thread.

Sampling goes to the replicas. Log-probs of given completions never do (asking an engine that has adapters for the log-probs of
a prompt can end it): the scorer, a forward pass of this process on the same base, gives them, and says of every adapter before
an engine sees it whether it fits the base.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import CoroutineType
from typing import Any, TypeVar

from pairloop.config import Config, PolicySection, duration_s, secret
from pairloop.errors import EngineError, ModelError, PairloopError
from pairloop.policy.checks import room
from pairloop.policy.protocols import (
    RESPONSE_FORMAT,
    TOP_LOGPROBS,
    Fetch,
    Policy,
    ReplicaState,
    ReplicaStatus,
    SampleRequest,
    Tokens,
    TokenSequence,
)
from pairloop.policy.remote.breaker import Breaker
from pairloop.policy.remote.fleet import Fleet
from pairloop.policy.remote.keeper import Keeper
from pairloop.policy.remote.replica import Adapter, Replica
from pairloop.types import BASE_VERSION, Completion, Version, VersionKind

T = TypeVar("T")
log = logging.getLogger(__name__)


class RemotePolicy:
    """Implements `Policy`; waits at most ``section.engine_wait`` for a first replica.

    ``scorer`` holds the same base in this process; it is closed with this policy. ``artifacts`` is the folder that
    ``section.engine_artifacts`` stands for on the engines' side. EngineError where no replica answers in time, ModelError where
    those that do serve another model.
    """

    def __init__(
        self,
        section: PolicySection,
        tokens: Tokens,
        scorer: Policy,
        *,
        vocab_size: int,
        artifacts: Path,
        key: str | None = None,
        max_context: int = 0,
    ) -> None:
        self._section = section
        self._tokens = tokens
        self._scorer = scorer
        self._vocab_size = vocab_size
        self._artifacts = artifacts.resolve()
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._loaded: set[int] = {BASE_VERSION}
        self._retired: set[int] = set()
        self._in_flight: Counter[int] = Counter()
        self._closed = False
        replicas = [
            Replica(
                url,
                name=f"engine {i}",
                base=section.engine_model,
                key=key,
                timeout_s=duration_s(section.engine_timeout),
                breaker=Breaker(),
            )
            for i, url in enumerate(section.engine_urls, start=1)
        ]
        self._fleet = Fleet(replicas, tokens, vocab_size=vocab_size)
        self._keeper = Keeper(
            *(self._fleet, tokens, scorer.logps),
            dtype=section.dtype,
            poll_s=duration_s(section.engine_poll),
            max_context=max_context,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pairloop-engines", daemon=True)
        self._thread.start()
        try:
            self._await(self._open())
        except BaseException:
            self._end()
            raise

    @property
    def tokens(self) -> Tokens:
        return self._tokens

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset({TOP_LOGPROBS, RESPONSE_FORMAT})

    @property
    def max_context(self) -> int:
        return min(self._keeper.max_context, self._scorer.max_context)

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        """See `Sampler.sample`. InvalidRequestError at once for what can never be sampled."""
        left = room(request, max_context=self.max_context, vocab_size=self._vocab_size)
        params = replace(request.params, max_tokens=min(request.params.max_tokens, left))
        with self._lock:
            problem = self._refusal(request.version)
            if problem is None:
                self._in_flight[request.version] += 1
        if problem is not None:
            refused: Future[tuple[Completion, ...]] = Future()
            refused.set_exception(EngineError(problem))
            return refused
        future = asyncio.run_coroutine_threadsafe(self._answer(replace(request, params=params)), self._loop)
        future.add_done_callback(lambda _: self._one_less(request.version))
        return future

    def load(self, version: Version) -> None:
        """See `Sampler.load`: returns once every ready replica has the adapter and gives its log-probs.

        ModelError where it does not fit the base, or where an engine is not set up to take it; EngineError where a replica
        does not compute it. What was loaded stays as it was.
        """
        with self._loading:
            number = version.number
            with self._lock:
                self._retired.discard(number)
                if number in self._loaded:
                    return
            if version.kind is not VersionKind.ADAPTER:
                raise ModelError(
                    f"{version.name} is a version of kind {version.kind}: engines behind HTTP take LoRA adapters only"
                )
            self._scorer.load(version)
            adapter = Adapter(number, adapter_name(version), self._engine_path(Path(version.path)))
            try:
                self._await(self._keeper.load(adapter))
            except BaseException:
                self._scorer.unload(number)
                raise
            with self._lock:
                self._loaded.add(number)

    def unload(self, number: int) -> None:
        """See `Sampler.unload`: requests in flight are still answered, then the engines and the scorer free it."""
        with self._lock:
            if number in self._loaded and number != BASE_VERSION:
                self._retired.add(number)
        self._free()

    def loaded(self) -> frozenset[int]:
        with self._lock:
            return frozenset(self._loaded - self._retired)

    def queued(self) -> int:
        with self._lock:
            return self._in_flight.total()

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        return tuple(replica.status() for replica in self._fleet.replicas)

    def close(self) -> None:
        """End all requests with EngineError and free thread, connections and scorer. Adapters stay on the engines, warm."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._end()

    def logps(self, version: int, sequences: Sequence[TokenSequence]) -> list[tuple[float, ...]]:
        """See `Scorer.logps`: by this process's own forward pass."""
        with self._lock:
            problem = self._refusal(version)
        if problem is not None:
            raise EngineError(problem)
        return self._scorer.logps(version, sequences)

    # -- inside -----------------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        """Begin to watch the replicas, and wait for the first that is ready."""
        section, replicas = self._section, self._fleet.replicas
        self._watching = [asyncio.create_task(self._keeper.watch(replica)) for replica in replicas]
        log.info("waiting for engines: %s", ", ".join(section.engine_urls))
        with suppress(TimeoutError):
            async with asyncio.timeout(duration_s(section.engine_wait)):
                await self._keeper.settled()
        if not any(replica.state is ReplicaState.READY for replica in replicas):
            problems = "; ".join(f"{replica.url} is {replica.state}: {replica.problem}" for replica in replicas)
            is_theirs = any(replica.state is ReplicaState.REFUSED for replica in replicas)
            kind = ModelError if is_theirs else EngineError
            raise kind(f"no engine was ready within {section.engine_wait}: {problems}")

    async def _answer(self, request: SampleRequest) -> tuple[Completion, ...]:
        try:
            return await self._fleet.complete(request)
        except asyncio.CancelledError:
            if self._closed:
                raise EngineError("the engine is closed") from None
            raise
        except PairloopError:
            raise
        except Exception as error:  # a listener that raises, say: its own request ends
            log.exception("a request ended with an error; the others go on")
            raise EngineError(f"sampling failed: {type(error).__name__}: {error}") from error

    def _refusal(self, version: int) -> str | None:
        if self._closed:
            return "the engine is closed"
        if version not in self._loaded or version in self._retired:
            return f"version {version} is not loaded"
        return None

    def _one_less(self, version: int) -> None:
        with self._lock:
            self._in_flight[version] -= 1
            is_last = version in self._retired and not self._in_flight[version]
        if is_last:  # in a thread of its own: this one is the loop's, which the unloading needs
            threading.Thread(target=self._free, name="pairloop-unload", daemon=True).start()

    def _free(self) -> None:
        """Unload what was retired and answers nothing any more."""
        with self._loading:
            with self._lock:
                free = [number for number in self._retired if not self._in_flight[number]]
                self._loaded.difference_update(free)
                self._retired.difference_update(free)
            for number in free:
                with suppress(EngineError):  # closed meanwhile
                    self._await(self._keeper.unload(number))
                    self._scorer.unload(number)

    def _engine_path(self, path: Path) -> str:
        """A version's folder as the engines see it."""
        root, here = self._section.engine_artifacts, path.resolve()
        if root is None:
            return str(here)
        if not here.is_relative_to(self._artifacts):
            raise ModelError(
                f"{path} is not in the artifacts folder {self._artifacts}, which policy.engine_artifacts stands for"
            )
        return str(PurePosixPath(root) / here.relative_to(self._artifacts))

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the loop do ``work``, and wait for it."""
        if self._loop.is_closed():
            work.close()
            raise EngineError("the engine is closed")
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except CancelledError:
            raise EngineError("the engine is closed") from None

    def _end(self) -> None:
        with suppress(EngineError):
            self._await(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._scorer.close()

    async def _shut(self) -> None:
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # what is cancelled may begin others to clean up
            begun = [task for task in tasks if _has_begun(task)]
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, asyncio.sleep(0), return_exceptions=True)
        for replica in self._fleet.replicas:
            await replica.close()
        await self._loop.shutdown_asyncgens()


def _has_begun(task: asyncio.Task[Any]) -> bool:
    """Only such a one may be cancelled: anyio's tasks wrap a coroutine that would otherwise never be awaited."""
    coroutine = task.get_coro()
    return not isinstance(coroutine, CoroutineType) or inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED


def adapter_name(version: Version) -> str:
    """The one name of a version on every engine: never used for other weights, so that no cache can be stale."""
    return f"{version.policy}--v{version.number}-{version.artifact_hash[:8]}"


def open_remote(config: Config, base_dir: Path, *, fetch: Fetch = Path) -> RemotePolicy:
    """The policy of ``config.policy.engine_urls``, scored by a `LocalPolicy` on ``base_dir``."""
    from pairloop.policy.local import LocalPolicy  # torch: only where a model is opened

    section = config.policy
    key = secret(section.engine_key_env) if section.engine_key_env is not None else None
    scorer = LocalPolicy(base_dir, section, fetch=fetch)
    try:
        return RemotePolicy(
            section,
            scorer.tokens,
            scorer,
            vocab_size=scorer.vocab_size,
            artifacts=config.artifacts_dir,
            key=key,
            max_context=config.serve.max_context,
        )
    except BaseException:
        scorer.close()
        raise
