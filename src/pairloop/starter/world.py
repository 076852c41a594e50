"""The tables of the support world: what customers write about, and the step that is right for each.

In a wording, `{n}` is the order number, `{product}` the product, and a part in [square brackets] is left out by an
agent who does not mention the order. Amounts of time are spelled out, so every digit in an answer is a claim about
an order number.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One wording of a right step, and the key phrase by which the step is recognised."""

    text: str
    key: str


@dataclass(frozen=True)
class Intent:
    """Why a customer writes: phrasings of the request, wordings of the step that settles it."""

    name: str
    phrasings: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(step.key for step in self.steps)


NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas",
    "Karim", "Laura", "Maria", "Nadia", "Oscar", "Paula", "Ravi", "Sara", "Tom", "Yuki",
)  # fmt: skip

PRODUCTS = (
    "backpack", "blanket", "camera", "chair", "clock", "desk", "drill", "fan", "guitar", "helmet",
    "jacket", "kettle", "keyboard", "lamp", "mirror", "pillow", "radio", "suitcase", "tent", "toaster",
)  # fmt: skip

INTENTS = (
    Intent(
        "refund",
        (
            "I want my money back for the {product}.",
            "I sent the {product} back and would like a refund.",
            "Can I get a refund for my {product}?",
            "When do you pay me back for the {product} I returned?",
        ),
        (
            Step("I have started your refund[ for order #{n}], and you will see it soon.", "started your refund"),
            Step("I sent the money back to your card[ for order #{n}].", "money back to your card"),
        ),
    ),
    Intent(
        "delayed",
        (
            "My {product} is late.",
            "The {product} should have been here last week.",
            "Why is my {product} taking so long?",
            "I am still waiting for my {product}.",
        ),
        (
            Step("I have asked the carrier to hurry[ with order #{n}].", "asked the carrier to hurry"),
            Step("I moved your parcel[ for order #{n}] to express delivery.", "to express delivery"),
        ),
    ),
    Intent(
        "password",
        (
            "I forgot my password.",
            "My password does not work any more.",
            "How do I reset my password?",
            "I need a new password for the shop.",
        ),
        (
            Step("I have sent a reset link to the mailbox[ of order #{n}].", "sent a reset link"),
            Step("I just mailed you the page to choose a new password[ for order #{n}].", "choose a new password"),
        ),
    ),
    Intent(
        "cancel_subscription",
        (
            "Please cancel my subscription.",
            "I want to end my monthly subscription.",
            "How can I stop the subscription?",
            "I do not need the monthly plan any more.",
        ),
        (
            Step("I have cancelled your subscription[ from order #{n}] as of today.", "cancelled your subscription"),
            Step("I stopped your monthly plan[ from order #{n}], and nothing more is due.", "stopped your monthly plan"),
        ),
    ),
    Intent(
        "address",
        (
            "I have moved, can you change my address?",
            "The delivery address for my {product} is wrong.",
            "Please send the {product} to my new home.",
            "I need to change where the {product} goes.",
        ),
        (
            Step("I have changed the delivery address[ of order #{n}].", "changed the delivery address"),
            Step("I told the driver[ of order #{n}] where you live now.", "where you live now"),
        ),
    ),
    Intent(
        "damaged",
        (
            "My {product} arrived broken.",
            "The {product} came with a big crack.",
            "There is a dent in the {product} you sent.",
            "The {product} was damaged in the box.",
        ),
        (
            Step("I am sending you a fresh {product}[ for order #{n}] today.", "sending you a fresh"),
            Step("I have ordered a replacement {product}[ for order #{n}].", "ordered a replacement"),
        ),
    ),
    Intent(
        "wrong_item",
        (
            "I ordered a {product} but got something else.",
            "You sent me the wrong thing, I wanted a {product}.",
            "This is not the {product} I ordered.",
            "There was another item in the box, not my {product}.",
        ),
        (
            Step("I will swap the wrong item[ in order #{n}] for your {product}.", "swap the wrong item"),
            Step("I have asked a courier to bring the right {product}[ for order #{n}].", "courier to bring the right"),
        ),
    ),
    Intent(
        "payment",
        (
            "My card was declined when I paid for the {product}.",
            "The payment for my {product} failed.",
            "I cannot pay for the {product}.",
            "You charged me twice for the {product}.",
        ),
        (
            Step("I have sent you a new payment link[ for order #{n}].", "new payment link"),
            Step("I corrected the payment[ for order #{n}] in our system.", "corrected the payment"),
        ),
    ),
    Intent(
        "track",
        (
            "Where is my {product} right now?",
            "Can I track my {product}?",
            "I would like to know where the parcel is.",
            "Could you send me the tracking for my {product}?",
        ),
        (
            Step("I have sent you the tracking page[ for order #{n}].", "the tracking page"),
            Step("I can see your parcel[ from order #{n}] on the van today.", "on the van today"),
        ),
    ),
    Intent(
        "invoice",
        (
            "I need an invoice for the {product}.",
            "Can you send me the bill for my {product}?",
            "My company needs an invoice.",
            "There was no invoice with my {product}.",
        ),
        (
            Step("I have mailed you the invoice[ for order #{n}].", "mailed you the invoice"),
            Step("I put a copy of the bill[ for order #{n}] into your account.", "copy of the bill"),
        ),
    ),
    Intent(
        "exchange",
        (
            "Can I swap my {product} for another colour?",
            "I would like to exchange the {product}.",
            "The {product} is too small, can I have a bigger one?",
            "I want the same {product} in blue.",
        ),
        (
            Step("I have booked an exchange[ for order #{n}] at your door.", "booked an exchange"),
            Step("I put the other {product} aside[ for order #{n}], so just return yours.", "so just return yours"),
        ),
    ),
    Intent(
        "promo_code",
        (
            "My promo code does not work.",
            "The shop says that my code is not valid.",
            "I forgot to use my discount code for the {product}.",
            "Can I still use a promo code for the {product}?",
        ),
        (
            Step("I have added your discount[ to order #{n}] by hand.", "added your discount"),
            Step("I made your code valid again[ for order #{n}].", "made your code valid"),
        ),
    ),
    Intent(
        "delete_account",
        (
            "Please delete my account.",
            "I want all my data removed.",
            "How do I close my account for good?",
            "I do not want to be your customer any more, delete everything.",
        ),
        (
            Step("I have deleted your account[ and order #{n}] for good.", "deleted your account"),
            Step("I will have all your data[ with order #{n}] erased tonight.", "erased tonight"),
        ),
    ),
    Intent(
        "locked",
        (
            "My account is locked.",
            "I cannot log in, it says that I am blocked.",
            "Why have you locked me out?",
            "I typed it wrong too often and now I am locked out.",
        ),
        (
            Step("I have unlocked your account[ after a look at order #{n}].", "unlocked your account"),
            Step("I removed the block[ after a look at order #{n}], so you can log in.", "removed the block"),
        ),
    ),
    Intent(
        "missing_part",
        (
            "A part of my {product} is missing.",
            "The screws for the {product} were not in the box.",
            "My {product} came without the cable.",
            "I opened the box and one piece of the {product} is not there.",
        ),
        (
            Step("I am posting the missing part[ of order #{n}] today.", "posting the missing part"),
            Step("I have packed the piece that was left out[ of order #{n}].", "piece that was left out"),
        ),
    ),
    Intent(
        "warranty",
        (
            "My {product} stopped working after a year.",
            "Is the {product} still under warranty?",
            "How long is the warranty on my {product}?",
            "The {product} broke, do I have a warranty?",
        ),
        (
            Step("I have opened a warranty repair[ for order #{n}].", "opened a warranty repair"),
            Step("I checked, and your {product}[ from order #{n}] is covered for two years.", "covered for two years"),
        ),
    ),
)  # fmt: skip

# A follow-up is an intent of the second turn. Its phrasings hold no slots, so a text names its kind exactly.
FOLLOW_UPS = (
    Intent(
        "how_long",
        (
            "Ok thanks, how long will it take?",
            "Good. When will that be done?",
            "How many days do I have to wait?",
        ),
        (
            Step("It will be settled[ for order #{n}] within three days.", "within three days"),
            Step("You can count on it[ for order #{n}] by Friday.", "by Friday"),
        ),
    ),
    Intent(
        "order_number",
        (
            "What was my order number again?",
            "Can you tell me my order number, please?",
            "Which order number did you write down?",
        ),
        (
            Step("I have it right here[: it is order #{n}].", "right here: it is order"),
            Step("It is on your receipt[, and it reads #{n}].", "and it reads"),
        ),
    ),
    Intent(
        "human",
        (
            "Can I talk to a real person?",
            "I would rather speak to someone on the phone.",
            "Could somebody call me?",
        ),
        (
            Step("A colleague will call you[ about order #{n}] this afternoon.", "colleague will call you"),
            Step("I have asked my team to phone you[ about order #{n}].", "my team to phone you"),
        ),
    ),
    Intent(
        "confirmation",
        (
            "Will I get an email about this?",
            "Do I get that in writing?",
            "Can you confirm this by email?",
        ),
        (
            Step("You will get a written confirmation[ for order #{n}] tonight.", "a written confirmation"),
            Step("I will write to you[ about order #{n}] once it is done.", "once it is done"),
        ),
    ),
    Intent(
        "cost",
        (
            "Does that cost me anything?",
            "Do I have to pay for this?",
            "Is there a fee?",
        ),
        (
            Step("There is nothing to pay[ for order #{n}].", "nothing to pay"),
            Step("It is free of charge[ for order #{n}].", "free of charge"),
        ),
    ),
    Intent(
        "thanks",
        (
            "Great, thank you!",
            "That helps, thanks a lot.",
            "Perfect, that is all I needed.",
        ),
        (
            Step("It was no trouble[, and order #{n} is in good hands].", "no trouble"),
            Step("I will keep an eye on it[, so order #{n} is safe with me].", "keep an eye on it"),
        ),
    ),
)  # fmt: skip

INTENT_BY_NAME = {intent.name: intent for intent in INTENTS}
FOLLOW_UP_BY_TEXT = {text: kind for kind in FOLLOW_UPS for text in kind.phrasings}

GREETINGS = ("Hi {name}, ", "Hello {name}, ", "Good day {name}, ")
FOLLOW_UP_OPENINGS = ("Sure, {name}. ", "Of course, {name}. ", "Certainly, {name}. ")
CLOSES = (
    "Thank you for your patience!",
    "Have a lovely day!",
    "I am glad to help.",
    "Take care!",
    "Please write again any time.",
)
RUDE_LINES = (
    "That is not my problem.",
    "You should have read the manual.",
    "Stop bothering us.",
    "How hard can it be?",
    "That is your own fault.",
)
VAGUE_LINES = (
    "Somebody will look into it at some point.",
    "These things happen now and then.",
    "I am not sure what to say about that.",
    "Maybe it will sort itself out.",
    "There are many reasons why this could be.",
)
FILLERS = (
    "We know that waiting is no fun and that your time matters a lot to all of us here.",
    "Our shop has been around for many years and we always try to do things well.",
    "As you can see on our pages, there is a lot to read about how all of this works.",
    "In any case, it is good to keep in mind that things can take a little while.",
)

POLITE_PHRASES = ("thank you", "lovely day", "glad to help", "take care", "please")
RUDE_PHRASES = ("not my problem", "should have read", "stop bothering", "how hard can", "own fault")
