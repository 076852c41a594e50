"""A verifier such as a team would write for its support bot: rules on what is visible in the chat.

It knows the shop's own steps and nothing of what customers like: it recognises the request by cues in the customer's
words, and checks the answer for the step, the order number, manners and form. It is right often, not always.
"""

import re

from pairloop.starter import world
from pairloop.starter.corpus import Message

# The first cue that matches the customer's words names the request, so narrow cues stand before wide ones.
_REQUEST_CUES = (
    ("promo_code", r"promo|discount|\bcode\b"),
    ("locked", r"\block|log in"),
    ("password", r"password"),
    ("cancel_subscription", r"subscription|monthly plan"),
    ("delete_account", r"delete|data removed|close my account"),
    ("refund", r"refund|money back|pay me back"),
    ("invoice", r"invoice|\bbill\b"),
    ("payment", r"declined|payment|cannot pay|charged"),
    ("warranty", r"warranty|stopped working"),
    ("wrong_item", r"something else|wrong thing|\bnot the\b|another item"),
    ("address", r"address|new home|change where"),
    ("missing_part", r"missing|screws|without the|not there"),
    ("damaged", r"broken|crack|dent|damaged"),
    ("exchange", r"swap|exchange|too small|in blue"),
    ("track", r"where is|track|where the parcel"),
    ("delayed", r"late\b|last week|so long|waiting"),
)
_FOLLOW_UP_CUES = (
    ("order_number", r"order number"),
    ("how_long", r"how long|how many days|when will"),
    ("human", r"person|phone|call me"),
    ("confirmation", r"email|in writing"),
    ("cost", r"cost|pay\b|fee\b"),
    ("thanks", r"thank|perfect"),
)
_STEP_KEYS = {topic.name: topic.keys for topic in (*world.INTENTS, *world.FOLLOW_UPS)}
_POLITE = re.compile(r"thank|please|glad|take care|lovely|welcome|sorry|best wishes|happy to", re.IGNORECASE)
_RUDE = re.compile("|".join(world.RUDE_PHRASES), re.IGNORECASE)
_MAX_WORDS = 40


def score(messages: list[Message], completion: str) -> float:
    """How good this completion is as the next answer of the chat, in [0, 1].

    .4 the step asked for (.2 where the request is not recognised), .2 the order number, .2 manners, .1 no repeated
    sentence, .1 not over-long; less .4 each for a number that is not the customer's, another request's step, rudeness.
    """
    asked = [message["content"] for message in messages if message["role"] == "user"]
    topic = recognise(asked)
    text = completion.lower()
    stated = set(re.findall(r"\d+", completion))
    known = set(re.findall(r"\d+", " ".join(asked)))
    total = 0.2 * bool(stated & known) + 0.2 * bool(_POLITE.search(text))
    total += _step_points(topic, text, number_right=bool(stated & known))
    total += 0.1 * (not _repeats_sentence(text)) + 0.1 * (len(text.split()) <= _MAX_WORDS)
    total -= 0.4 * bool(stated - known) + 0.4 * bool(_RUDE.search(text))
    return min(1.0, max(0.0, total)) if text.strip() else 0.0


def recognise(asked: list[str]) -> str | None:
    """The topic of the customer's last message, or None; `asked` are the customer's messages in order."""
    if not asked:
        return None
    cues = _FOLLOW_UP_CUES if len(asked) > 1 else _REQUEST_CUES
    last = asked[-1].lower()
    return next((topic for topic, cue in cues if re.search(cue, last)), None)


def _step_points(topic: str | None, text: str, *, number_right: bool) -> float:
    if topic is None:
        return 0.2
    if topic == "order_number":
        return 0.4 * number_right
    taken = {name for name, keys in _STEP_KEYS.items() if any(key.lower() in text for key in keys)}
    return 0.4 if topic in taken else -0.4 * bool(taken)


def _repeats_sentence(text: str) -> bool:
    sentences = [part.strip() for part in re.split(r"[.!?]+", text) if part.strip()]
    return len(set(sentences)) < len(sentences)
