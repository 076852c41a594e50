"""What the configured verifier or judge says of a version's samples: against the champion's, and against the base's.

The base is the absolute anchor: a chain of duels, each won against the last champion, could still drift away from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pairloop.config import Config
from pairloop.errors import UserError
from pairloop.judge import messages_of
from pairloop.loop.evaluate import labeller
from pairloop.loop.evaluate.estimates import mean
from pairloop.loop.evaluate.labeller import MAX_LABELLER_ERRORS, Labeller, LabellerFailed
from pairloop.statistics import share
from pairloop.types import Completion, Group, Interval

Answers = Sequence[Completion]

VERIFIER_METRIC, SEED_METRIC = "verifier_increase", "seed_win_rate"
_MIN_ANSWERS = 2


def wanted(config: Config) -> tuple[str, ...]:
    """The metrics that this configuration gives: a verifier costs nothing, a judge is asked only where the gate requires it."""
    if config.label.verifier is not None:
        return (VERIFIER_METRIC, SEED_METRIC)
    return (SEED_METRIC,) if config.label.judge_url is not None and "seed_duel" in config.gate.require else ()


def measure(config: Config, prompts: Sequence[Group], new: Answers, old: Answers, seed: Answers) -> dict[str, Interval]:
    """The wanted metrics, from one answer each to every prompt; UserError where the labeller fails on too many."""
    with labeller.configured(config.label) as judge:
        metrics = {SEED_METRIC: _seed_win_rate(judge, prompts, new, seed)}
        if judge.score is not None:
            metrics[VERIFIER_METRIC] = _verifier_increase(judge, prompts, new, old)
    return metrics


def _seed_win_rate(judge: Labeller, prompts: Sequence[Group], new: Answers, seed: Answers) -> Interval:
    """Share of prompts on which the version's answer is better than the base's, ties half."""

    def won(group: Group, ours: str, theirs: str) -> float:
        return 0.5 if ours == theirs else (judge.compare(messages_of(group.prompt), theirs, ours).outcome + 1) / 2

    values = _by_prompt(judge, won, prompts, new, seed)
    return share(sum(values) / len(values), len(values))


def _verifier_increase(judge: Labeller, prompts: Sequence[Group], new: Answers, old: Answers) -> Interval:
    """Mean difference of the verifier's scores, paired by prompt."""
    score = judge.score
    assert score is not None, "only a verifier scores"

    def gained(group: Group, ours: str, theirs: str) -> float:
        messages = messages_of(group.prompt)
        return score(messages, ours) - score(messages, theirs)

    return mean(_by_prompt(judge, gained, prompts, new, old)).interval()


def _by_prompt(
    judge: Labeller, value: Callable[[Group, str, str], float], prompts: Sequence[Group], ours: Answers, theirs: Answers
) -> list[float]:
    """The value of each prompt on which the labeller did not fail; UserError where it failed on too many."""
    values, problems = [], []
    for group, a, b in zip(prompts, ours, theirs, strict=True):
        try:
            values.append(value(group, a.text, b.text))
        except LabellerFailed as failure:
            problems.append(str(failure))
    if len(values) < _MIN_ANSWERS or len(problems) > MAX_LABELLER_ERRORS * len(prompts):
        first = f" (the first: {problems[0]})" if problems else ""
        raise UserError(f"{judge.name} failed on {len(problems)} of {len(prompts)} prompts{first}")
    return values
