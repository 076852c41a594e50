"""Family J: one pick, ``{"messages":[…],"preferred_completion":…,"other_completion":…,"tied":null|"good"|"bad"}``.

A completion is a string or an assistant message. ``tied`` says that neither is better: both good (a tie) or both bad.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import CannotHold, Family, messages, picked, texts, tool_keys
from pairloop.formats.row import Draft, Mark, Row
from pairloop.types import PREFERENCE_METRIC, Label

_ANSWERS = ("preferred_completion", "other_completion")
_TIED: dict[str | None, Label] = {None: Label.A, "good": Label.TIE, "bad": Label.BOTH_BAD}


def matches(row: Mapping[str, Any]) -> bool:
    return any(key in row for key in _ANSWERS)


def parse(row: Row) -> Draft:
    tools = turns.offered(row, row.value, "$")
    prompt = turns.conversation(row, "$.messages", row.get(row.value, "$", "messages"), tools)
    found = [row.answer(f"$.{key}", row.get(row.value, "$", key)) for key in _ANSWERS]
    tied = row.value.get("tied")
    label = _TIED.get(tied) if tied is None or isinstance(tied, str) else None
    if label is None:
        row.refuse("$.tied", "bad_label", f'tied is null, "good" or "bad"; found {tied!r}')
    marks = () if label is None else (Mark(PREFERENCE_METRIC, label=label, rater_id=row.rater(row.value, "$")),)
    return Draft(prompt, row.answers(found, distinct=True), marks)


def write(draft: Draft) -> dict[str, Any]:
    label = picked(draft)
    if label is Label.SKIP:
        raise CannotHold("skip")
    first, second = texts(draft)
    preferred, other = (second, first) if label is Label.B else (first, second)
    tied = {Label.TIE: "good", Label.BOTH_BAD: "bad"}.get(label)
    completions = {"preferred_completion": preferred, "other_completion": other}
    return {"messages": messages(draft), **completions, "tied": tied, **tool_keys(draft)}


FAMILY = Family("picks", matches, parse, write)
