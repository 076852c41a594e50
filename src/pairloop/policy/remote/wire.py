"""The bodies of a vLLM-compatible server, as seen on vLLM 0.32: what is asked, and strict readers of what is answered.

``/v1/completions`` takes prompts as token ids, so the prompt is the one that our own template and tokenizer made. Its streamed
chunks hold, per choice, ``token_ids`` and raw log-probs (before temperature and top-p), one entry per token, the
end-of-sequence token among them; ``return_tokens_as_token_ids`` names the alternatives by id (``token_id:44``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pairloop.errors import EngineError, InvalidRequestError
from pairloop.policy.protocols import SampleRequest

DONE = "[DONE]"
BAD_REQUEST = (400, 422)
_PREFIX = "token_id:"
_SEEDS = 2**63


class ReplicaUnavailableError(EngineError):
    """A replica that does not answer, or answers with a 5xx; ``gone`` where the connection itself failed."""

    def __init__(self, message: str, *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class GarbageError(EngineError):
    """A replica that answers what no engine of this kind would."""


class MissingAdapterError(EngineError):
    """A replica that does not know the adapter: it was started again, or someone unloaded it."""


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token; ``top``: (token id, log-prob) of the likeliest, the likeliest first."""

    token_id: int
    logp: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a chunk adds to completion ``index``; ``finish`` with its last one."""

    index: int
    tokens: tuple[Token, ...]
    finish: str | None


@dataclass(frozen=True, slots=True)
class Served:
    """``GET /v1/models``: the base's name, its context, and the adapters on it."""

    base: str
    max_model_len: int
    adapters: frozenset[str]


def completion_body(request: SampleRequest, model: str, *, n: int, eos_token_ids: Iterable[int]) -> dict[str, Any]:
    """The body of ``POST /v1/completions``: every setting that shapes the draw is named.

    What is left out the server fills from the model's generation_config.json, which may hold top-k or a penalty.
    """
    params = request.params
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt_token_ids),
        "n": n,
        "max_tokens": params.max_tokens,
        "temperature": 0.0 if params.is_greedy else params.temperature,
        "top_p": params.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop": list(params.stop),
        "stop_token_ids": sorted(eos_token_ids),
        "logprobs": request.top_logprobs,
        "stream": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if params.seed is not None:
        body["seed"] = params.seed % _SEEDS
    if request.response_format is not None:
        body["response_format"] = dict(request.response_format)
    return body


def read_chunk(data: str, request: SampleRequest, *, n: int, vocab_size: int) -> list[Piece]:
    """The pieces of one streamed chunk; GarbageError names what is wrong with it.

    The engine's own errors come as chunks too: InvalidRequestError where the request is at fault (a schema that it cannot
    follow, say), which it only finds after it began to answer, else ReplicaUnavailableError.
    """
    chunk = _object(_json(data), "a chunk")
    if "error" in chunk:
        code = chunk["error"].get("code") if isinstance(chunk["error"], Mapping) else None
        raise (
            refusal(error_message(chunk))
            if code in BAD_REQUEST
            else ReplicaUnavailableError(f"it broke off: {error_message(chunk)}")
        )
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        raise GarbageError(f"a chunk without choices: {data[:200]}")
    return [_piece(_object(choice, "a choice"), request, n, vocab_size) for choice in choices]


def read_models(payload: Any, base: str | None) -> Served:
    """What a server serves; ``base`` names the base model where it lists several without a parent."""
    entries = [_object(entry, "a model") for entry in _list(_object(payload, "the list of models").get("data"), "data")]
    bases = {str(entry.get("id")): entry for entry in entries if entry.get("parent") is None}
    if not bases or (base is not None and base not in bases):
        named = "base model" if base is None else f"model {base!r} (policy.engine_model)"
        raise GarbageError(f"lists no {named}; it lists {sorted(str(entry.get('id')) for entry in entries)}")
    name = base if base is not None else next(iter(bases))
    length = bases[name].get("max_model_len")
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise GarbageError(f"lists {name!r} without max_model_len: not a vLLM-compatible server")
    # Several names of one base are all parents; an adapter names the first.
    adapters = frozenset(str(entry.get("id")) for entry in entries if entry.get("parent") in bases)
    return Served(name, length, adapters)


def refusal(text: str) -> InvalidRequestError:
    return InvalidRequestError(f"the engine refuses the request: {text}")


def error_message(payload: Any) -> str:
    """The sentence in an error body of whatever shape."""
    error = payload.get("error", payload) if isinstance(payload, Mapping) else payload
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:500]


def error_text(body: str) -> str:
    try:
        return error_message(json.loads(body))
    except ValueError:
        return " ".join(body.split())[:200] or "no text"


def _piece(choice: Mapping[str, Any], request: SampleRequest, n: int, vocab_size: int) -> Piece:
    index = choice.get("index")
    if not isinstance(index, int) or not 0 <= index < n:
        raise GarbageError(f"a choice with index {index!r} where {n} were asked for")
    prompt = choice.get("prompt_token_ids")
    if prompt is not None and tuple(_list(prompt, "prompt_token_ids")) != request.prompt_token_ids:
        raise GarbageError("it read another prompt than the one that was sent")
    finish = choice.get("finish_reason")
    if finish is not None and not isinstance(finish, str):
        raise GarbageError(f"finish_reason {finish!r}")
    ids = _list(choice.get("token_ids") or [], "token_ids")
    if not ids:
        return Piece(index, (), finish)
    logprobs = _object(choice.get("logprobs"), "logprobs")
    logps = _list(logprobs.get("token_logprobs"), "token_logprobs")
    tops = _list(logprobs.get("top_logprobs"), "top_logprobs") if request.top_logprobs else [{}] * len(ids)
    if not len(ids) == len(logps) == len(tops):
        raise GarbageError(f"{len(ids)} token ids with {len(logps)} log-probs")
    tokens = [
        Token(_token_id(token, vocab_size), _logp(logp), _top(top, request.top_logprobs, vocab_size))
        for token, logp, top in zip(ids, logps, tops, strict=True)
    ]
    return Piece(index, tuple(tokens), finish)


def _top(found: Any, wanted: int, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """The ``wanted`` likeliest: the engine adds the sampled token where it is not among them."""
    entries: list[tuple[int, float]] = []
    for key, logp in _object(found or {}, "top_logprobs").items():
        digits = key.removeprefix(_PREFIX)
        if digits == key or not digits.isdecimal():
            raise GarbageError(f"an alternative named {key!r} instead of {_PREFIX}…")
        entries.append((_token_id(int(digits), vocab_size), _logp(logp)))
    return tuple(sorted(entries, key=lambda entry: -entry[1])[:wanted])


def _token_id(value: Any, vocab_size: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise GarbageError(f"token id {value!r} where the vocabulary has {vocab_size}")
    return value


def _logp(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise GarbageError(f"log-prob {value!r}")
    return float(value)


def _json(data: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise GarbageError(f"not JSON: {data[:200]!r}") from error


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise GarbageError(f"{what} is not an object: {str(value)[:100]}")
    return value


def _list(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise GarbageError(f"{what} is not a list: {str(value)[:100]}")
    return value
