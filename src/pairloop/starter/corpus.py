"""The chats of the support world: customers' cases, agents' answers of mixed quality, and the held-out split.

Everything is drawn with a given `random.Random`, so a seed names a corpus. About a third of the chats have a second
turn. Answers are drawn by style; the styles are known here only, and no customer and no verifier ever sees them.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pairloop.starter import world
from pairloop.starter.world import Intent, Step

Message = dict[str, str]

STYLE_WEIGHTS: dict[str, float] = {
    "good": 0.14,
    "without_number": 0.12,
    "without_close": 0.12,
    "curt": 0.13,
    "rude": 0.13,
    "vague": 0.11,
    "off_topic": 0.11,
    "repeats": 0.07,
    "over_long": 0.07,
}
SECOND_TURN_SHARE = 1 / 3
HELD_OUT_ONE_IN = 10
SHORT_SHARE = 0.08


@dataclass(frozen=True)
class Case:
    """One customer's case: who writes, about what, and the first message as written.

    Name and order number are empty where the text gives neither; only the corpus has such cases.
    """

    intent: str
    name: str
    product: str
    order_number: str
    text: str

    def messages(self) -> list[Message]:
        """The prompt of the first turn."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Chat:
    """A finished chat of the corpus: `turns` are (customer's text, agent's answer), `styles` one per answer."""

    case: Case
    turns: tuple[tuple[str, str], ...]
    styles: tuple[str, ...]

    def messages(self) -> list[Message]:
        return [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]


def is_held_out(name: str, order_number: str) -> bool:
    """Whether this customer is on the held-out side (one in ten), by a hash that is the same on every machine.

    Name and order number are hashed, because every text shows both: a product that a text does not mention would let
    the same text fall on either side.
    """
    digest = hashlib.sha256(f"{name}|{order_number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def draw_training_case(rng: random.Random) -> Case:
    """A case that may be trained on and served to customers whose picks train."""
    return _draw_case(rng, held_out=False)


def draw_held_out_case(rng: random.Random) -> Case:
    """A case whose slot combination is never in the corpus and never served for training."""
    return _draw_case(rng, held_out=True)


def draw_follow_up(rng: random.Random) -> str:
    """A customer's message of the second turn."""
    return rng.choice(rng.choice(world.FOLLOW_UPS).phrasings)


def draw_chat(rng: random.Random) -> Chat:
    """One chat of the training corpus."""
    case = _shortened(draw_training_case(rng), rng) if rng.random() < SHORT_SHARE else draw_training_case(rng)
    style = _draw_style(rng)
    turns = [(case.text, write_answer(case, style, rng))]
    styles = [style]
    if rng.random() < SECOND_TURN_SHARE:
        question, style = draw_follow_up(rng), _draw_style(rng)
        turns.append((question, write_answer(case, style, rng, turn=question)))
        styles.append(style)
    return Chat(case, tuple(turns), tuple(styles))


def chats(seed: int) -> Iterator[Chat]:
    """The endless corpus of this seed."""
    rng = random.Random(f"corpus-{seed}")
    while True:
        yield draw_chat(rng)


def write_answer(case: Case, style: str, rng: random.Random, *, turn: str | None = None) -> str:
    """An agent's answer in one style; `turn` is the customer's follow-up, or None for the first turn."""
    topics, topic, openings = _topic(case, turn)
    opening = rng.choice(openings)
    opening = opening.format(name=case.name) if case.name else re.sub(r",? \{name\}", "", opening)
    close = rng.choice(world.CLOSES)
    step = rng.choice(topic.steps)
    full, bare = _fill(step, case, numbered=bool(case.order_number)), _fill(step, case, numbered=False)
    match style:
        case "good":
            return f"{opening}{full} {close}"
        case "without_number":
            return f"{opening}{bare} {close}"
        case "without_close":
            return f"{opening}{full}"
        case "curt":
            return bare
        case "rude":
            return _rude(bare, rng)
        case "vague":
            vague = rng.choice(world.VAGUE_LINES)
            return f"{vague} {close}" if rng.random() < 0.3 else vague
        case "off_topic":
            other = rng.choice(rng.choice([t for t in topics if t is not topic]).steps)
            wrong = _fill(other, case, numbered=bool(case.order_number) and rng.random() < 0.5)
            return f"{opening}{wrong} {close}" if rng.random() < 0.5 else f"{opening}{wrong}"
        case "repeats":
            said = full if rng.random() < 0.5 else bare
            return f"{opening}{said} {said}" if rng.random() < 0.5 else f"{said} {said} {close}"
        case "over_long":
            return " ".join([opening + full, *rng.sample(world.FILLERS, 2), close])
    raise ValueError(f"unknown style {style!r}")


def _draw_style(rng: random.Random) -> str:
    return rng.choices(list(STYLE_WEIGHTS), weights=list(STYLE_WEIGHTS.values()))[0]


def _draw_case(rng: random.Random, *, held_out: bool) -> Case:
    while True:
        name, number = rng.choice(world.NAMES), str(rng.randint(100, 999))
        if is_held_out(name, number) is held_out:
            break
    intent, product = rng.choice(world.INTENTS), rng.choice(world.PRODUCTS)
    request = rng.choice(intent.phrasings).format(product=product)
    return Case(intent.name, name, product, number, _write_request(request, name, number, rng))


def _shortened(case: Case, rng: random.Random) -> Case:
    """The same request in a hurry: no name, no order number, often no capitals. A visitor writes like that.

    Without such chats the model makes up a name and a number for whoever gives none.
    """
    text = rng.choice(world.INTENT_BY_NAME[case.intent].phrasings).format(product=case.product)
    if rng.random() < 0.6:
        text = text.lower().rstrip(".?")
    return replace(case, name="", order_number="", text=text)


def _write_request(request: str, name: str, number: str, rng: random.Random) -> str:
    order = f"#{number}" if rng.random() < 0.8 else number
    hello = rng.choice(("Hi", "Hello", "Good morning"))
    match rng.randrange(5):
        case 0:
            return f"{hello}, this is {name}. {request} My order number is {order}."
        case 1:
            return f"{request} It is order {order}. Thanks, {name}"
        case 2:
            return f"{hello}! {request} The order number is {order}. Best wishes, {name}"
        case 3:
            return f"{hello}, I am {name}, order {order}. {request}"
        case _:
            return f"{request} My name is {name}, and my order is {order}."


def _topic(case: Case, turn: str | None) -> tuple[tuple[Intent, ...], Intent, tuple[str, ...]]:
    """All topics of this turn, the one asked about, and the openings an agent uses in it."""
    if turn is None:
        return world.INTENTS, world.INTENT_BY_NAME[case.intent], world.GREETINGS
    return world.FOLLOW_UPS, world.FOLLOW_UP_BY_TEXT[turn], world.FOLLOW_UP_OPENINGS


def _fill(step: Step, case: Case, *, numbered: bool) -> str:
    text = step.text.replace("[", "").replace("]", "") if numbered else re.sub(r"\[.*?\]", "", step.text)
    return text.format(n=case.order_number, product=case.product)


def _rude(bare_step: str, rng: random.Random) -> str:
    lines = rng.sample(world.RUDE_LINES, 2)
    return f"{lines[0]} {bare_step}" if rng.random() < 0.6 else " ".join(lines)
