"""What every family of dataset rows has: a name, the keys that give it away, a parser, and for pairs a writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pairloop.errors import UserError
from pairloop.formats.row import Draft, Mark, Row
from pairloop.types import PREFERENCE_METRIC, Label, PreferencePair, messages_as_dicts


@dataclass(frozen=True, slots=True)
class Family:
    """``matches`` looks at keys alone; ``parse`` records every problem in the row and returns what could be read."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Row], Draft]
    write: Callable[[PreferencePair], dict[str, Any]] | None = None


def first_is_better(row: Row) -> tuple[Mark, ...]:
    """The mark of a row that names its chosen answer: completions are (chosen, rejected), so A was picked."""
    return (Mark(PREFERENCE_METRIC, label=Label.A, rater_id=row.rater(row.value, "$")),)


def prompt_messages(pair: PreferencePair) -> list[dict[str, str]]:
    """The prompt as messages; UserError for a plain string, which a conversation would hand to the chat template."""
    if isinstance(pair.prompt, str):
        raise UserError(f"pair {pair.pair_id}: a prompt that is a plain string fits only the family 'trl'; export as trl")
    return messages_as_dicts(pair.prompt)
