"""Family A: ``{"input":{"messages":[…]},"preferred_output":[…],"non_preferred_output":[…]}``, our form on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats.family import Family, first_is_better, prompt_messages
from pairloop.formats.row import MISSING, Draft, Row
from pairloop.types import PreferencePair


def matches(row: Mapping[str, Any]) -> bool:
    return "preferred_output" in row or "non_preferred_output" in row


def parse(row: Row) -> Draft:
    given = row.get(row.value, "$", "input")
    prompt = row.conversation("$.input.messages", row.get(given, "$.input", "messages"))
    if given is not MISSING and isinstance(given, Mapping) and given.get("tools"):
        row.refuse("$.input.tools", "tools", "tools are not supported")
    keys = ("preferred_output", "non_preferred_output")
    answers = row.answers([row.answer_message(f"$.{key}", row.get(row.value, "$", key)) for key in keys], distinct=True)
    return Draft(prompt, answers, first_is_better(row))


def write(pair: PreferencePair) -> dict[str, Any]:
    return {
        "input": {"messages": prompt_messages(pair), "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": pair.chosen.text}],
        "non_preferred_output": [{"role": "assistant", "content": pair.rejected.text}],
    }


FAMILY = Family("openai", matches, parse, write)
