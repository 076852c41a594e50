"""Family A: ``{"input":{"messages":[…]},"preferred_output":[…],"non_preferred_output":[…]}``, our form on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family, assistant, decided, first_is_better, messages, tool_keys
from pairloop.formats.row import Draft, Row

_ANSWERS = ("preferred_output", "non_preferred_output")


def matches(row: Mapping[str, Any]) -> bool:
    return any(key in row for key in _ANSWERS)


def parse(row: Row) -> Draft:
    given = row.get(row.value, "$", "input")
    tools = turns.offered(row, given, "$.input")
    prompt = turns.conversation(row, "$.input.messages", row.get(given, "$.input", "messages"), tools)
    found = [row.answer_message(f"$.{key}", row.get(row.value, "$", key)) for key in _ANSWERS]
    return Draft(prompt, row.answers(found, distinct=True), first_is_better(row))


def write(draft: Draft) -> dict[str, Any]:
    chosen, rejected = decided(draft)
    return {
        "input": {"messages": messages(draft), **tool_keys(draft, always=True)},
        "preferred_output": [assistant(chosen)],
        "non_preferred_output": [assistant(rejected)],
    }


FAMILY = Family("openai", matches, parse, write)
