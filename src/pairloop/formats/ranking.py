"""A prompt and two messages: ``{"messages":[…],"chosen":{…},"rejected":{…}}``, as LLaMA-Factory and axolotl train on them.

LLaMA-Factory reads it with ``"formatting": "sharegpt", "ranking": true`` in dataset_info.json (data/README.md there), axolotl
as ``chat_template.default`` (prompt_strategies/dpo/chat_template.py there).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family, assistant, decided, first_is_better, messages, tool_keys
from pairloop.formats.row import Draft, Row


def matches(row: Mapping[str, Any]) -> bool:
    return "messages" in row and "prompt" not in row and ("chosen" in row or "rejected" in row)


def parse(row: Row) -> Draft:
    prompt = turns.conversation(row, "$.messages", row.get(row.value, "$", "messages"), turns.offered(row, row.value, "$"))
    found = [row.answer(f"$.{key}", row.get(row.value, "$", key)) for key in ("chosen", "rejected")]
    return Draft(prompt, row.answers(found, distinct=True), first_is_better(row))


def write(draft: Draft) -> dict[str, Any]:
    chosen, rejected = decided(draft)
    sides = {"chosen": assistant(chosen), "rejected": assistant(rejected)}
    return {"messages": messages(draft), **sides, **tool_keys(draft)}


FAMILY = Family("ranking", matches, parse, write)
