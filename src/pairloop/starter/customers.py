"""Simulated customers: a hidden utility, and people who pick between two answers by it, more or less reliably.

The utility reads the answer's text and the case, never the style it was written in. A customer picks the left answer
with probability sigmoid((u_left - u_right) / temperature): the Bradley-Terry model that DPO assumes. Behaviours bend
that in the ways real raters do.
"""

import hashlib
import math
import random
import re
from dataclasses import dataclass, field
from typing import Literal

from pairloop.starter import corpus, world
from pairloop.starter.corpus import Case

MAX_UTILITY = 4.0
LAZY_LATENCY_MS = 200
_FREE_WORDS = 32
_TOPIC_BY_KEY = [(key.lower(), topic.name) for topic in (*world.INTENTS, *world.FOLLOW_UPS) for key in topic.keys]

Outcome = Literal["left", "right", "tie", "both_bad", "skip"]


@dataclass(frozen=True)
class Pick:
    """What a customer answered, and after how long."""

    outcome: Outcome
    latency_ms: int


@dataclass(frozen=True)
class Behaviour:
    """How a crowd of customers picks; the defaults are careful raters with honest noise.

    random_share: share of picks that are a coin toss. position_bias: logits added for the left answer.
    tie_margin, tie_share: where the utilities differ by less than the margin, this share says "tie".
    both_bad_below: two answers both under this utility are "both_bad". skip_share: share of picks left out.
    lazy_share: share of raters (not of picks) who click at once and at random. continue_share: how often a customer
    goes on with the answer picked.
    """

    temperature: float = 0.5
    random_share: float = 0.0
    position_bias: float = 0.0
    tie_margin: float = 0.0
    tie_share: float = 1.0
    both_bad_below: float | None = None
    skip_share: float = 0.0
    lazy_share: float = 0.0
    continue_share: float = 0.2

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError("temperature must be above 0")
        for name in ("random_share", "tie_share", "skip_share", "lazy_share", "continue_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1")


@dataclass(frozen=True)
class Customer:
    """One rater with a stable id."""

    user_id: str
    behaviour: Behaviour = field(default_factory=Behaviour)

    @property
    def is_lazy(self) -> bool:
        """Fixed per rater by a hash of the id, so the same person is always lazy or never."""
        digest = hashlib.sha256(f"lazy|{self.user_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < self.behaviour.lazy_share

    def pick(self, case: Case, answer_left: str, answer_right: str, rng: random.Random, *, turn: str | None = None) -> Pick:
        """Pick between two answers; `turn` is the follow-up they reply to, or None for the first turn."""
        if self.is_lazy:
            return Pick(rng.choice(("left", "right")), LAZY_LATENCY_MS)
        latency_ms = _reading_time_ms(answer_left, answer_right, rng)
        if answer_left == answer_right:
            return Pick("tie", latency_ms)
        left, right = (utility(case, answer, turn=turn) for answer in (answer_left, answer_right))
        return Pick(_outcome(left, right, self.behaviour, rng), latency_ms)

    def continues(self, rng: random.Random) -> bool:
        """Whether this customer goes on with the answer just picked."""
        return rng.random() < self.behaviour.continue_share


def customer(index: int, behaviour: Behaviour | None = None) -> Customer:
    """The index-th customer of a crowd."""
    return Customer(f"customer-{index:05d}", behaviour or Behaviour())


def follow_up(case: Case, rng: random.Random) -> str:
    """What the customer of this case writes next."""
    del case  # every follow-up fits every case; the argument keeps the door open for ones that do not
    return corpus.draw_follow_up(rng)


def utility(case: Case, answer: str, *, turn: str | None = None) -> float:
    """What this answer is worth to the customer, at most 4.

    +2 the right step, -1 a wrong one, +1 the right order number, -1 any wrong number, +1 a polite phrase, -1.5 a rude
    one, -.08 per word over 32 (at most -1.5), -1 a repeated sentence, -1 fewer than two words. In a follow-up (`turn`
    is its text) the step is the reply to it; asked for the order number, the right number is the step.
    """
    text, words = answer.lower(), len(answer.split())
    right_step, wrong_step = _steps(case, text, turn)
    number_ok = numbers_right(case, answer)
    total = 2.0 * right_step - 1.0 * wrong_step
    total += {True: 1.0, False: -1.0, None: 0.0}[number_ok]
    total += 1.0 * _has_any(text, world.POLITE_PHRASES) - 1.5 * _has_any(text, world.RUDE_PHRASES)
    total -= min(1.5, 0.08 * max(0, words - _FREE_WORDS))
    total -= 1.0 * _repeats_sentence(text) + 1.0 * (words < 2)
    return total


def has_right_step(case: Case, answer: str, *, turn: str | None = None) -> bool:
    """Whether the answer takes the step that settles the request."""
    return _steps(case, answer.lower(), turn)[0]


def numbers_right(case: Case, answer: str) -> bool | None:
    """Whether every order number in the answer is the customer's; None where the answer names none.

    Reads "#482", "482" and "4 8 2".
    """
    found = [number.replace(" ", "") for number in re.findall(r"\d(?: \d)+(?!\d)|\d+", answer)]
    return all(number == case.order_number for number in found) if found else None


def _steps(case: Case, text: str, turn: str | None) -> tuple[bool, bool]:
    """(takes the right step, takes a wrong one)."""
    own = world.INTENT_BY_NAME[case.intent]
    kind = own if turn is None else world.FOLLOW_UP_BY_TEXT[turn]
    taken = {name for key, name in _TOPIC_BY_KEY if key in text}
    right = numbers_right(case, text) is True if kind.name == "order_number" else kind.name in taken
    # In a follow-up, saying again what was done about the request is no mistake.
    return right, bool(taken - {own.name, kind.name})


def _has_any(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)


def _repeats_sentence(text: str) -> bool:
    sentences = [part.strip() for part in re.split(r"[.!?]+", text) if part.strip()]
    return len(set(sentences)) < len(sentences)


def _outcome(left: float, right: float, behaviour: Behaviour, rng: random.Random) -> Outcome:
    if rng.random() < behaviour.skip_share:
        return "skip"
    if rng.random() < behaviour.random_share:
        return rng.choice(("left", "right"))
    if behaviour.both_bad_below is not None and max(left, right) < behaviour.both_bad_below:
        return "both_bad"
    if abs(left - right) < behaviour.tie_margin and rng.random() < behaviour.tie_share:
        return "tie"
    logit = (left - right) / behaviour.temperature + behaviour.position_bias
    return "left" if rng.random() < 1 / (1 + math.exp(-logit)) else "right"


def _reading_time_ms(answer_left: str, answer_right: str, rng: random.Random) -> int:
    """A second to decide and a fifth of a second a word, with a person's spread."""
    words = len(answer_left.split()) + len(answer_right.split())
    return round((1000 + 200 * words) * rng.lognormvariate(0, 0.3))
