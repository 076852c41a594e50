"""What the demo measures of a version: the hidden utility on held-out prompts, one sample each at T = 1.

The same prompts for every version; their slot combinations were never in the corpus and are never served. Nothing here is
read by any stage of the loop.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from pairloop.policy.protocols import Sampler, SampleRequest
from pairloop.starter import corpus, customers
from pairloop.types import Interval, Message, SamplingParams

N_PROMPTS = 500
MAX_TOKENS = 80
Z_95 = 1.959964


@dataclass(frozen=True)
class Measured:
    """Answers of one version on the held-out prompts, and what they are worth."""

    answers: tuple[str, ...]
    utilities: tuple[float, ...]
    fidelity: Interval
    """Of the answers that contain an order number, the share whose every number is the customer's."""

    @property
    def utility(self) -> float:
        return math.fsum(self.utilities) / len(self.utilities)


def held_out_cases(n: int = N_PROMPTS) -> list[corpus.Case]:
    """The demo's prompts: the same for every seed, version and control."""
    rng = random.Random("demo-held-out")
    return [corpus.draw_held_out_case(rng) for _ in range(n)]


def measure(sampler: Sampler, version: int, cases: Sequence[corpus.Case], *, seed: int) -> Measured:
    """One sample per case from a loaded version; ``seed`` fixes the samples."""
    futures = [
        sampler.sample(
            SampleRequest(
                sampler.tokens.encode_prompt(tuple(Message(m["role"], m["content"]) for m in case.messages())),
                version,
                params=SamplingParams(max_tokens=MAX_TOKENS, seed=seed * 1_000_003 + index),
            )
        )
        for index, case in enumerate(cases)
    ]
    answers = tuple(future.result()[0].text for future in futures)
    numbers = [
        right
        for case, answer in zip(cases, answers, strict=True)
        if (right := customers.numbers_right(case, answer)) is not None
    ]
    utilities = tuple(customers.utility(case, answer) for case, answer in zip(cases, answers, strict=True))
    return Measured(answers, utilities, mean_interval([float(right) for right in numbers]))


def win_rate(challenger: Measured, base: Measured) -> Interval:
    """Share of prompts where the challenger's hidden utility is higher than the base's, ties half."""
    return mean_interval(
        [
            1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
            for ours, theirs in zip(challenger.utilities, base.utilities, strict=True)
        ]
    )


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with its normal 95 % interval."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1)
    half = Z_95 * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)
