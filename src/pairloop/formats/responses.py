"""Family E: ``{"messages":[…],"preferred_response":"…","dispreferred_response":"…"}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats.family import Family, first_is_better, prompt_messages
from pairloop.formats.row import Draft, Row
from pairloop.types import PreferencePair

_ANSWERS = ("preferred_response", "dispreferred_response")


def matches(row: Mapping[str, Any]) -> bool:
    return any(key in row for key in _ANSWERS)


def parse(row: Row) -> Draft:
    prompt = row.conversation("$.messages", row.get(row.value, "$", "messages"))
    answers = row.answers([(f"$.{key}", row.get(row.value, "$", key)) for key in _ANSWERS], distinct=True)
    return Draft(prompt, answers, first_is_better(row))


def write(pair: PreferencePair) -> dict[str, Any]:
    return {
        "messages": prompt_messages(pair),
        "preferred_response": pair.chosen.text,
        "dispreferred_response": pair.rejected.text,
    }


FAMILY = Family("responses", matches, parse, write)
