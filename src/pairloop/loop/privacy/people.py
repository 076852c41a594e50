"""By which ids a person may be stored, and whom a name means."""

from __future__ import annotations

from pairloop.config import Config
from pairloop.errors import ConflictError
from pairloop.redaction import pseudonym_of
from pairloop.store import Store, erasures
from pairloop.store.subjects import CONVERSATION, EXPERT, OPERATOR, is_operator, of_operator, of_person, untagged


def person_of(store: Store, config: Config, *, user: str | None = None, rater: str | None = None) -> str:
    """The subject of who is named: as a ``rater`` always whoever asks and picks, as a ``user`` also an operator.

    ConflictError where ``user`` names an operator as the audit trail does, and a customer is called the same: it has to be said
    who is meant.
    """
    name = user or rater or ""
    if not is_operator(name):
        return name
    if user is None:
        return of_person(name)
    with store.reading() as c:
        is_customer = not erasures.find(c, ids_of(store, config, of_person(name))).is_empty
    if is_customer:
        raise ConflictError(
            f"{name!r} is how an operator is named, and a customer or rater is called the same; say who is meant: the operator "
            f"is user {of_operator(name)!r}, the customer is rater {name!r}"
        )
    return of_operator(name)


def ids_of(store: Store, config: Config, person: str) -> tuple[str, ...]:
    """The subjects of a person: as they are, and the pseudonyms that stand for them, whatever ``privacy.redact`` is now; the
    one that is stored today comes last.

    Of an operator also the rater id of their own votes (``expert:account:ada``); of a conversation, its id's pseudonym. A name
    of an operator's form without a tag is both, the operator and the customer who is called so.
    """
    operator = person.removeprefix(OPERATOR).removeprefix(EXPERT)
    if not is_operator(operator):
        return _stored(store, config, untagged(person))
    own = (of_operator(operator), *_stored(store, config, f"{EXPERT}{operator}"))
    return (*own, *_stored(store, config, person)) if person == operator else own


def _stored(store: Store, config: Config, name: str) -> tuple[str, ...]:
    """A user's or rater's subject, and that of their pseudonym; the one that is stored today comes last."""
    prefix = CONVERSATION if name.startswith(CONVERSATION) else ""
    bare = name.removeprefix(prefix)
    known = pseudonym_of(config.state_dir, bare)
    today = prefix + (bare if store.redactor is None else store.redactor.identifier(bare))
    names = [name] if known is None else [name, f"{prefix}{known}"]
    return tuple(map(of_person, (*(one for one in names if one != today), today)))
