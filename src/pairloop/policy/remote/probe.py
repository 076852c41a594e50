"""Does a replica compute what it should? Its log-probs of a few tokens beside this process's own forward pass.

Two questions, both asked before a replica gets traffic. Of the base, when it appears: do its recorded log-probs agree with the
trainer's, so that they may serve as the reference? Of each adapter that it loads: are these the log-probs of that adapter's
weights, and not the base's or another's?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pairloop.errors import EngineError, InvalidRequestError, ModelError
from pairloop.policy import agreement
from pairloop.policy.protocols import SampleRequest, Tokens
from pairloop.types import BASE_VERSION, Completion, Message, SamplingParams

QUESTIONS = (
    "Hello, can you help me?",
    "Where is my order 4417?",
    "Tell me about yourself in a few words.",
    "What is the best way to learn to cook?",
)
AGREEMENT_TOKENS = 16
PROBE_TOKENS = 16
OTHER_WEIGHTS = 0.5
"""Nats per token, in the mean, beyond which a base does not compute less exactly but is another model."""
APART = 1e-4
"""Nats by which an adapter must move some token, for an engine that does not move with it to be found out."""
NOISE = 3.0
"""How many times its largest error on the base an engine's error on an adapter may be."""


def agreement_requests(tokens: Tokens) -> list[SampleRequest]:
    """What the base is asked: pairs of answers, tempered, so that a server that records tempered log-probs is found out."""
    params = SamplingParams(max_tokens=AGREEMENT_TOKENS, temperature=0.7, seed=0)
    return [SampleRequest(_prompt(tokens, question), BASE_VERSION, 2, params) for question in QUESTIONS]


def probe_request(tokens: Tokens, version: int) -> SampleRequest:
    return SampleRequest(_prompt(tokens, QUESTIONS[0]), version, 1, SamplingParams(max_tokens=PROBE_TOKENS, temperature=0.0))


def measure(theirs: Sequence[Sequence[Completion]], ours: Sequence[Sequence[Sequence[float]]], dtype: str) -> dict[str, Any]:
    """The agreement report; ModelError where these are the log-probs of another model."""
    deltas = [
        [[a - b for a, b in zip(completion.logps, own, strict=True)] for completion, own in zip(group, owns, strict=True)]
        for group, owns in zip(theirs, ours, strict=True)
    ]
    report = agreement.report(deltas, dtype)
    flat = [abs(delta) for group in deltas for completion in group for delta in completion]
    mean = sum(flat) / max(1, len(flat))
    if not mean <= OTHER_WEIGHTS:
        raise ModelError(
            f"serves other weights than policy.model: its log-probs are {mean:.2f} nats per token from those of the model here"
        )
    return report


def verdict(
    engine: Sequence[float],
    engine_base: tuple[Sequence[int], Sequence[float]],
    token_ids: Sequence[int],
    own: Sequence[float],
    own_base: Sequence[float],
    report: Mapping[str, Any],
) -> None:
    """EngineError unless ``engine``, its log-probs of ``token_ids`` under the adapter, are those of the adapter's weights.

    ``own`` and ``own_base``: this process's, under the adapter and under the base. ``engine_base``: what the engine's base
    answered to the same prompt. An adapter that changes nothing yet (B = 0) rightly gives the base's to the last bit.
    """
    apart = max(abs(a - b) for a, b in zip(own, own_base, strict=True))
    if apart > APART and tuple(engine_base[0]) == tuple(token_ids) and tuple(engine_base[1]) == tuple(engine):
        raise EngineError(f"gives the base's log-probs to the last bit, where the adapter moves them by {apart:.2g} nats")
    errors = [abs(a - b) for a, b in zip(engine, own, strict=True)]
    allowed = max(report["token_tolerance"], NOISE * report["max_token_delta"])
    if not max(errors) <= allowed:
        base_errors = [abs(a - b) for a, b in zip(engine, own_base, strict=True)]
        whose = "the base's" if sum(base_errors) < sum(errors) else "of other weights"
        raise EngineError(
            f"gives log-probs that are {whose}: up to {max(errors):.2g} nats from the adapter's (noise: {allowed:.2g})"
        )


def _prompt(tokens: Tokens, question: str) -> tuple[int, ...]:
    """The question in the model's template, or as plain text where it has none."""
    try:
        return tokens.encode_prompt((Message("user", question),))
    except InvalidRequestError:
        return tokens.encode_prompt(question)
