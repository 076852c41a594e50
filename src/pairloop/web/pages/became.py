"""What became of a group's feedback, in the same words wherever it is told. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pairloop.store.outcomes import Outcome
from pairloop.store.preferences import State
from pairloop.types import Group, GroupKind, Pool
from pairloop.web.words import WHY


def state_of(group: Group, outcome: Outcome, reasons: Sequence[str]) -> State:
    """``reasons``: why its votes were left out, of those that were."""
    if outcome.versions and group.pool is Pool.TRAIN:
        return State.TRAINED
    if outcome.datasets:
        return State.KEPT
    if reasons:
        return State.LEFT_OUT
    return State.JUDGED if group.kind is GroupKind.DUEL else State.WAITING


def why_in_none(group: Group, outcome: Outcome, reasons: Sequence[str], *, has_votes: bool) -> str:
    """Why no dataset holds a pair of the group, in a sentence or two."""
    if not has_votes:
        return "In no dataset: nobody has said anything about it."
    match state_of(group, outcome, reasons):
        case State.LEFT_OUT:
            return " ".join(["Left out.", *dict.fromkeys(WHY.get(one, f"{one.replace('_', ' ')}.") for one in reasons)])
        case State.JUDGED:
            return "In no dataset: its votes judged a version in a duel, and such votes do not train."
    if outcome.is_excluded:
        return "Excluded: no dataset takes it."
    return "No dataset has looked at it yet: the next one will."
