"""Scored groups for a job that names a verifier: the parent answers each prompt several times, and the verifier scores."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

from pairloop.config import Config
from pairloop.errors import InvalidRequestError
from pairloop.judge import VerifierError, load_verifier
from pairloop.loop import label, pairs
from pairloop.loop.cycle import Loop
from pairloop.loop.jobs import methods
from pairloop.loop.jobs.dataset import Rows
from pairloop.loop.pairs.rows import refuse_empty
from pairloop.policy.protocols import SampleRequest
from pairloop.store.jobs import Job
from pairloop.types import Completion, Group, LabelledGroup, SamplingParams, Version

logger = logging.getLogger(__name__)

IN_FLIGHT = 8
"""Prompts that the engine is asked at a time: customers' requests must find room beside them."""


def roll_out(
    loop: Loop, config: Config, job: Job, parent: Version, prompts: Sequence[Group], tell: Callable[[int], bool]
) -> Rows | None:
    """What the job trains on; None where ``tell``, which is told how many prompts are answered, says that it is to stop.

    A prompt on which the verifier fails is left out and counted; InvalidRequestError where no group with a contrast is left.
    """
    name = methods.verifier_of(job.method)
    assert name is not None, "the job names a verifier"
    verifier, scored, failed = load_verifier(name), list[LabelledGroup](), 0
    loop.policy.load(parent)
    for group in _answered(loop, job, parent, prompts):
        try:
            scored.append(LabelledGroup(group, label.score(verifier, group)))
        except VerifierError as error:
            failed += 1
            logger.warning("%s: %s", job.job_id, error)
        if not tell(len(scored) + failed):
            return None
    objective = methods.objective_of(job.method)
    compiled = pairs.compile_rows(scored, pairs.PairRules.of(config), objective)
    if failed == len(prompts):
        raise InvalidRequestError(f"the verifier {name} failed on every prompt", param="training_file", code="verifier_failed")
    refuse_empty(compiled, objective)
    dropped = {**compiled.dropped, **({"verifier_failed": failed} if failed else {})}
    return Rows(compiled.train, compiled.heldout, len(prompts), compiled.counts, dropped)


def _answered(loop: Loop, job: Job, parent: Version, prompts: Sequence[Group]) -> Iterator[Group]:
    size, tokens = methods.group_size_of(job.method), loop.policy.tokens
    params = SamplingParams(max_tokens=loop.config.serve.max_tokens, seed=None)
    waiting: deque[tuple[Group, Future[tuple[Completion, ...]]]] = deque()
    try:
        for prompt in prompts:
            ids = tokens.encode_prompt(prompt.prompt)
            group = replace(prompt, prompt_token_ids=ids, sampling=params)
            waiting.append((group, loop.policy.sample(SampleRequest(ids, parent.number, size, params))))
            if len(waiting) >= IN_FLIGHT:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        for _, future in waiting:
            future.cancel()


def _finished(group: Group, future: Future[tuple[Completion, ...]]) -> Group:
    return replace(group, completions=future.result())
