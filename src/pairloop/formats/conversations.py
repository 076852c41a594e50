"""Family B: two conversations, ``{"chosen":{"messages":[…]},"rejected":{"messages":[…]}}`` or the lists themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family, assistant, decided, first_is_better, messages, tool_keys
from pairloop.formats.row import Draft, Found, Row
from pairloop.types import Message


def matches(row: Mapping[str, Any]) -> bool:
    return "prompt" not in row and "messages" not in row and ("chosen" in row or "rejected" in row)


def parse(row: Row) -> Draft:
    tools = turns.offered(row, row.value, "$")
    sides = [_split(row, key, tools) for key in ("chosen", "rejected")]
    prompt = shared_prompt(row, [prompt for prompt, _ in sides])
    return Draft(prompt, row.answers([answer for _, answer in sides], distinct=True), first_is_better(row))


def shared_prompt(row: Row, prompts: list[tuple[Message, ...] | None]) -> tuple[Message, ...] | None:
    """The one prompt that these conversations begin with, or None with the turn at which they part."""
    first = prompts[0]
    for other in prompts[1:]:
        if first is None or other is None:
            return None
        if other != first:
            pairs = enumerate(zip(first, other, strict=False))
            turn = next((index for index, (a, b) in pairs if a != b), min(len(first), len(other)))
            said = f"the conversations must share all but the last turn; they differ at turn {turn}"
            row.refuse("$", "prompts_differ", said)
            return None
    return first


def _split(row: Row, key: str, tools: list[dict[str, Any]]) -> tuple[tuple[Message, ...] | None, Found]:
    value, path = row.get(row.value, "$", key), f"$.{key}"
    if isinstance(value, Mapping):
        value, path = row.get(value, path, "messages"), f"{path}.messages"
    return turns.split(row, path, value, tools)


def write(draft: Draft) -> dict[str, Any]:
    chosen, rejected = decided(draft)
    prompt = messages(draft)
    sides = {"chosen": chosen, "rejected": rejected}
    return {**{key: {"messages": [*prompt, assistant(text)]} for key, text in sides.items()}, **tool_keys(draft)}


FAMILY = Family("conversations", matches, parse, write)
