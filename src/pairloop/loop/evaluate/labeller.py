"""The configured verifier or judge, as one who compares two answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from pairloop.config import LabelSection
from pairloop.errors import UserError
from pairloop.judge import Outcome, PairwiseJudge, VerifierError, load_verifier

MAX_LABELLER_ERRORS = 0.05
"""Share of prompts on which the labeller may fail: an error is HOLD, never PROMOTE, for what a verifier cannot score may be
just what is bad about a version. A judge that was once out of reach out of a hundred decides nothing."""


class LabellerFailed(UserError):
    """The verifier or judge said nothing about one prompt."""


class Compared(NamedTuple):
    """+1 where the second answer is better, -1 where the first one is, 0 for a tie; ``flipped``: the two orders disagreed."""

    outcome: int
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class Labeller:
    """``compare``: (messages, one answer, the other). ``score``: of a verifier alone, (messages, answer)."""

    name: str
    compare: Callable[[list[dict[str, Any]], str, str], Compared]
    score: Callable[[list[dict[str, Any]], str], float] | None = None


@contextmanager
def configured(section: LabelSection) -> Iterator[Labeller]:
    """The verifier or judge that the section names; ConfigError where it names none, or that cannot be had."""
    if section.verifier is not None:
        yield _by_verifier(section.verifier)
        return
    with PairwiseJudge.configured(section) as judge:

        def compare(messages: list[dict[str, Any]], one: str, other: str) -> Compared:
            judgement = judge.compare(messages, one, other)
            if judgement.outcome is Outcome.ERROR:
                raise LabellerFailed(judgement.reason or "the judge failed")
            return Compared({Outcome.A: -1, Outcome.B: 1}.get(judgement.outcome, 0), judgement.flipped)

        yield Labeller(f"judge {section.judge_model}", compare)


def _by_verifier(name: str) -> Labeller:
    verifier = load_verifier(name)

    def score(messages: list[dict[str, Any]], answer: str) -> float:
        try:
            return verifier(messages, answer)
        except VerifierError as error:
            raise LabellerFailed(str(error)) from error

    def compare(messages: list[dict[str, Any]], one: str, other: str) -> Compared:
        difference = score(messages, other) - score(messages, one)
        return Compared((difference > 0) - (difference < 0))

    return Labeller(f"verifier {name}", compare, score)
