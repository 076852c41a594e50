"""Family H: a conversation that ends with the chosen answer, and beside it ``{"messages":[…],"rejected_message":{…}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family, assistant, decided, first_is_better, messages, tool_keys
from pairloop.formats.row import Draft, Row


def matches(row: Mapping[str, Any]) -> bool:
    return "rejected_message" in row


def parse(row: Row) -> Draft:
    tools = turns.offered(row, row.value, "$")
    prompt, chosen = turns.split(row, "$.messages", row.get(row.value, "$", "messages"), tools)
    rejected = row.assistant_turn("$.rejected_message", row.get(row.value, "$", "rejected_message"))
    return Draft(prompt, row.answers([chosen, rejected], distinct=True), first_is_better(row))


def write(draft: Draft) -> dict[str, Any]:
    chosen, rejected = decided(draft)
    whole = [*messages(draft), assistant(chosen)]
    return {"messages": whole, "rejected_message": assistant(rejected), **tool_keys(draft)}


FAMILY = Family("rejected_message", matches, parse, write)
