"""Family E: ``{"messages":[…],"preferred_response":"…","dispreferred_response":"…"}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family, decided, first_is_better, messages, tool_keys
from pairloop.formats.row import Draft, Row

_ANSWERS = ("preferred_response", "dispreferred_response")


def matches(row: Mapping[str, Any]) -> bool:
    return any(key in row for key in _ANSWERS)


def parse(row: Row) -> Draft:
    prompt = turns.conversation(row, "$.messages", row.get(row.value, "$", "messages"), turns.offered(row, row.value, "$"))
    answers = row.answers([(f"$.{key}", row.get(row.value, "$", key)) for key in _ANSWERS], distinct=True)
    return Draft(prompt, answers, first_is_better(row))


def write(draft: Draft) -> dict[str, Any]:
    return {"messages": messages(draft), **dict(zip(_ANSWERS, decided(draft), strict=True)), **tool_keys(draft)}


FAMILY = Family("responses", matches, parse, write)
