"""Whom an erasure is about: one name for each person, also where an operator and a customer are called the same.

Operators stand in the audit trail as ``account:ada``; customers are called what their application calls them, which may be
``account:42``. The two never stand in the same column, so that a tag before the name is enough to tell them apart.
"""

from __future__ import annotations

from collections.abc import Collection

ACCOUNT = "account:"
KINDS = (ACCOUNT, "key:", "address:", "cli:")
"""What the audit trail's name of an actor begins with; see `audit.AuditEntry`."""
EXPERT = "expert:"
"""What the rater id of an operator's own vote begins with, before their name in the audit trail."""
OPERATOR = "operator:"
"""The tag of an operator."""
RATER = "rater:"
"""The tag of a user or rater; the audit trail's subjects about raters begin with it, whatever they are called."""
CONVERSATION = "conversation:"
"""What the rater id begins with of those who asked without saying who they are."""


def is_operator(name: str) -> bool:
    """Whether this is how the audit trail names an operator."""
    return name.startswith(KINDS)


def is_reserved(name: str) -> bool:
    """Whether nobody may be called so: it would be read as a vote of an operator, or as a tag."""
    return any(name.startswith(tag) and is_operator(name.removeprefix(tag)) for tag in (EXPERT, OPERATOR, RATER))


def of_operator(name: str) -> str:
    return f"{OPERATOR}{name}"


def of_person(name: str) -> str:
    """A user or rater of that id."""
    return f"{RATER}{name}" if is_operator(name) else name


def untagged(subject: str) -> str:
    """The name alone. Entries of the ledger from before there were tags hold the hash of this."""
    for tag in (OPERATOR, RATER):
        if subject.startswith(tag) and is_operator(subject.removeprefix(tag)):
            return subject.removeprefix(tag)
    return subject


def as_people(subjects: Collection[str]) -> list[str]:
    """The subjects as columns of users and raters hold them; a name without a tag is anybody's."""
    return [untagged(one) for one in subjects if not (one.startswith(OPERATOR) and untagged(one) != one)]


def as_operators(subjects: Collection[str]) -> list[str]:
    """The subjects as the audit trail names operators; a name without a tag is anybody's."""
    return [name for one in subjects if is_operator(name := one if is_operator(one) else one.removeprefix(OPERATOR))]
