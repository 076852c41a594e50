"""The probe: a version is loaded, answers, and is not its parent in disguise, before any alias names it."""

from __future__ import annotations

import logging

from pairloop.errors import EngineError, ModelError
from pairloop.policy.protocols import Policy, SampleRequest, TokenSequence
from pairloop.types import BASE_VERSION, Completion, Message, SamplingParams, Version

logger = logging.getLogger(__name__)

PROBE_PROMPT = (Message("user", "Hello, can you help me?"),)
PROBE_ANSWER = "Hello! I am happy to help you."
_PROBE_TOKENS = 8
_PROBE_TIMEOUT_S = 120.0


def load(policy: Policy, version: Version, parent: Version | None) -> None:
    """Load and probe a version: it is loaded, it answers a known prompt, and it is not its parent in disguise.

    An engine that ignores an adapter, or serves a cached one, gives the parent's log-probs to the last bit: EngineError. They
    are compared on what the version answers, and on a given answer where the model's template can write one.
    """
    policy.load(version)
    if version.number not in policy.loaded():
        raise EngineError(f"{version.name}: the engine took it, but does not list it as loaded")
    prompt, completion = answers(policy, version)
    if version.number == BASE_VERSION or parent is None:
        return
    policy.load(parent)
    known = [TokenSequence(prompt, completion.token_ids)]
    try:
        known.append(TokenSequence(prompt, policy.tokens.encode_completion(PROBE_PROMPT, PROBE_ANSWER)))
    except ModelError as error:  # a template that breaks the prefix rule serves all the same
        logger.info("%s is probed on its own answer only: %s", version.name, error)
    if policy.logps(version.number, known) == policy.logps(parent.number, known):
        raise EngineError(
            f"{version.name}: gives the log-probs of its parent {parent.name}: the engine did not load its weights"
        )


def answers(policy: Policy, version: Version) -> tuple[tuple[int, ...], Completion]:
    """The known prompt and what a loaded version answers to it; EngineError where it has no answer."""
    prompt = policy.tokens.encode_prompt(PROBE_PROMPT)
    params = SamplingParams(max_tokens=_PROBE_TOKENS, seed=0)
    completions = policy.sample(SampleRequest(prompt, version.number, params=params)).result(timeout=_PROBE_TIMEOUT_S)
    if not completions or not completions[0].token_ids:
        raise EngineError(f"{version.name}: gave no answer to a known prompt")
    return prompt, completions[0]
