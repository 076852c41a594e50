"""By which ids a person may be stored."""

from __future__ import annotations

from pairloop.config import Config
from pairloop.loop.curate import EXPERT
from pairloop.redaction import pseudonym_of
from pairloop.store import Store
from pairloop.store.erasures import CONVERSATION
from pairloop.store.operators import is_operator


def ids_of(store: Store, config: Config, person: str) -> tuple[str, ...]:
    """As it is, the pseudonym that stands for it, whatever ``privacy.redact`` is now; the one that is stored today comes last.

    Of an operator, named as in the audit trail (``account:ada``), also the rater id of their own votes
    (``expert:account:ada``); of a conversation, its id's pseudonym.
    """
    operator = person.removeprefix(EXPERT)
    names = [operator, f"{EXPERT}{operator}"] if is_operator(operator) else []
    names.append(person)
    prefix = CONVERSATION if person.startswith(CONVERSATION) else ""
    for name in list(names):
        bare = name.removeprefix(prefix)
        known = pseudonym_of(config.state_dir, bare)
        names += [] if known is None else [f"{prefix}{known}"]
    bare = person.removeprefix(prefix)
    today = prefix + (bare if store.redactor is None else store.redactor.identifier(bare))
    return (*dict.fromkeys(name for name in names if name != today), today)
