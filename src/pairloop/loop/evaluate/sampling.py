"""Samples of a version for a report: one completion per prompt at T = 1, the same ones whenever it is asked again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from pairloop.config import Config
from pairloop.errors import EngineError
from pairloop.policy.protocols import Policy, SampleRequest, TokenSequence
from pairloop.types import Completion, Group, PreferencePair, SamplingParams, Version


def sample(policy: Policy, config: Config, asked: Sequence[Group], version: Version, *, role: str) -> list[Completion]:
    """One completion per prompt at T = 1, all queued before the first is waited for; once more where it was evicted."""
    for last_try in (False, True):
        policy.load(version)
        requests = [_request(policy, config, group, version, f"{role}/{i}") for i, group in enumerate(asked)]
        futures = [policy.sample(request) for request in requests]
        try:
            return _scored(policy, version, requests, [future.result()[0] for future in futures])
        except EngineError:
            if last_try or version.number in policy.loaded():
                raise
        finally:
            for future in futures:
                future.cancel()
    raise AssertionError("the second try returns or raises")


def _scored(policy: Policy, version: Version, requests: Sequence[SampleRequest], answers: list[Completion]) -> list[Completion]:
    """The answers with log-probs also where an engine recorded none, as its own do not agree with the trainer's."""
    bare = [i for i, answer in enumerate(answers) if not answer.logps]
    sequences = [TokenSequence(requests[i].prompt_token_ids, answers[i].token_ids) for i in bare]
    for i, logps in zip(bare, policy.logps(version.number, sequences) if bare else (), strict=True):
        answers[i] = replace(answers[i], logps=logps)
    return answers


def _request(policy: Policy, config: Config, group: Group, version: Version, key: str) -> SampleRequest:
    """Seeded by version and place, so that a report that is made again is the same report."""
    seed = int.from_bytes(hashlib.sha256(f"{version.name}/{key}".encode()).digest()[:4])
    params = SamplingParams(max_tokens=config.evaluate.max_tokens, seed=seed)
    return SampleRequest(prompt_token_ids(policy, group), version.number, params=params)


def prompt_token_ids(policy: Policy, group: Group | PreferencePair) -> tuple[int, ...]:
    return group.prompt_token_ids or policy.tokens.encode_prompt(group.prompt)
