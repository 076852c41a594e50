"""One vLLM-compatible server: its HTTP calls, and what is known of it. Lives in the policy's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from pairloop.errors import EngineError, ModelError
from pairloop.policy.protocols import ReplicaState, ReplicaStatus
from pairloop.policy.remote.breaker import Breaker
from pairloop.policy.remote.wire import (
    BAD_REQUEST,
    DONE,
    GarbageError,
    MissingAdapterError,
    ReplicaUnavailableError,
    Served,
    error_text,
    read_models,
    refusal,
)

CONNECT_S = 5.0
LOOK_S = 10.0
"""How long a replica may take to say that it is well."""
LOAD_S = 300.0
"""How long it may take to load an adapter."""
_KEEP_ALIVE = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A version as engines know it: one name for one version, whatever happens to it; ``path`` is as the engine sees it."""

    number: int
    name: str
    path: str


class Replica:
    """A server's state, its breaker, its requests in flight, and the calls. All errors are `EngineError`s that name its URL."""

    def __init__(self, url: str, *, name: str, base: str | None, key: str | None, timeout_s: float, breaker: Breaker) -> None:
        self.url = url
        self.name = name
        """What errors call it: they reach clients, whom its address does not concern."""
        self.breaker = breaker
        self.state = ReplicaState.DOWN
        self.problem = "not asked yet"
        self.outstanding = 0
        self.look_now = asyncio.Event()
        """Set where something happened that a look at it should not wait for."""
        self.served: Served | None = None
        self.agreement: Mapping[str, Any] | None = None
        """How its log-probs of the base compare with the trainer's own; None until measured, anew after each absence."""
        self._base = base
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_KEEP_ALIVE),
            trust_env=False,
        )

    @property
    def base(self) -> str:
        assert self.served is not None, "a replica that was never looked at gets no requests"
        return self.served.base

    @property
    def recorded(self) -> bool:
        """True where its log-probs are the trainer's own, and so may serve as the reference."""
        return self.agreement is not None and self.agreement["passed"] is True

    @property
    def takes_requests(self) -> bool:
        return self.state is ReplicaState.READY and self.breaker.admits

    def move(self, state: ReplicaState, problem: str = "") -> None:
        """Change the state, and say so once."""
        if (state, problem) == (self.state, self.problem):
            return
        log.log(
            logging.WARNING if problem else logging.INFO,
            "%s (%s) is %s%s",
            self.name,
            self.url,
            state,
            f": {problem}" if problem else "",
        )
        self.state, self.problem = state, problem
        if state is ReplicaState.DOWN:
            self.agreement = None

    def failed(self, error: EngineError) -> None:
        """A request failed here: gone replicas are out at once, others after a few failures in a row."""
        self.breaker.failed()
        if isinstance(error, ReplicaUnavailableError) and error.gone:
            self.move(ReplicaState.DOWN, str(error))

    def status(self) -> ReplicaStatus:
        agreement = self.agreement or {}
        return ReplicaStatus(
            url=self.url,
            state=self.state,
            circuit=self.breaker.state.value,
            outstanding=self.outstanding,
            recorded=self.recorded,
            max_token_delta=agreement.get("max_token_delta"),
            problem=self.problem,
        )

    async def look(self) -> Served:
        """Is it well, and what does it serve? Asked of /health and /v1/models."""
        await self._call("GET", "/health", timeout_s=LOOK_S)
        reply = await self._call("GET", "/v1/models", timeout_s=LOOK_S)
        try:
            self.served = read_models(reply.json(), self._base)
        except ValueError as error:
            raise GarbageError(f"{self.name}: /v1/models is not JSON") from error
        except GarbageError as error:
            raise GarbageError(f"{self.name}: {error}") from error
        return self.served

    async def load(self, adapter: Adapter) -> None:
        """Load an adapter; one that is there already is fine. ModelError where the server will never take it."""
        body = {"lora_name": adapter.name, "lora_path": adapter.path}
        reply = await self._send("POST", "/v1/load_lora_adapter", body, timeout_s=LOAD_S)
        text = error_text(reply.text)
        if reply.status_code < 300 or (reply.status_code == 400 and "already been loaded" in text):
            return
        if "No adapter found" in text:
            raise ModelError(
                f"{self.name} finds no adapter at {adapter.path}: mount the artifacts folder there too, and set "
                "policy.engine_artifacts to its path as the engine sees it"
            )
        if reply.status_code == 404:
            raise ModelError(
                f"{self.name} has no /v1/load_lora_adapter: start it with --enable-lora and the environment variable "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        if "max_lora_rank" in text:
            raise ModelError(f"{self.name} refuses {adapter.name}: {text}; start it with a larger --max-lora-rank")
        if 400 <= reply.status_code < 500 and reply.status_code not in (401, 403, 429):
            raise ModelError(f"{self.name} refuses {adapter.name}: {text}")
        raise self._problem(reply.status_code, text)

    async def unload(self, name: str) -> None:
        """Free an adapter; one that is not there is fine."""
        reply = await self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, timeout_s=LOOK_S)
        if reply.status_code >= 300 and reply.status_code not in (400, 404):
            raise self._problem(reply.status_code, error_text(reply.text))

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """The data of each event of a streamed completion, up to the last. Leaving it early ends the request there too."""
        with _Failing(self):
            async with self._client.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    self._refused(reply.status_code, error_text((await reply.aread()).decode(errors="replace")))
                async with aclosing(reply.aiter_lines()) as lines:  # type: ignore[type-var]  # httpx's generator, typed as iterator
                    async for line in lines:
                        data = line.removeprefix("data:").strip()
                        if line.startswith("data:") and data != DONE:  # read to the end, so that the connection can serve again
                            yield data
                        elif data and data != DONE and not line.startswith(":"):
                            raise GarbageError(f"{self.name}: not an event: {line[:200]!r}")

    async def close(self) -> None:
        await self._client.aclose()

    def _refused(self, status: int, text: str) -> None:
        if status == 404:
            raise MissingAdapterError(f"{self.name}: {text}")
        if status in BAD_REQUEST:
            raise refusal(text)
        raise self._problem(status, text)

    def _problem(self, status: int, text: str) -> EngineError:
        if status in (401, 403):
            text = f"{text}; put its key into the environment variable that policy.engine_key_env names"
        return ReplicaUnavailableError(f"{self.name} answers {status}: {text}")

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, *, timeout_s: float) -> httpx.Response:
        with _Failing(self):
            return await self._client.request(method, path, json=body, timeout=httpx.Timeout(timeout_s, connect=CONNECT_S))

    async def _call(self, method: str, path: str, *, timeout_s: float) -> httpx.Response:
        reply = await self._send(method, path, None, timeout_s=timeout_s)
        if reply.status_code != 200:
            raise self._problem(reply.status_code, error_text(reply.text))
        return reply


class _Failing:
    """httpx's errors as ours, with the replica's URL."""

    def __init__(self, replica: Replica) -> None:
        self._name = replica.name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            raise ReplicaUnavailableError(f"{self._name} was silent for too long") from error
        if isinstance(error, httpx.DecodingError | httpx.InvalidURL):
            raise GarbageError(f"{self._name}: {error}") from error
        if isinstance(error, httpx.HTTPError):
            reason = str(error) or type(error).__name__
            raise ReplicaUnavailableError(f"{self._name} cannot be reached: {reason}", gone=True) from error
