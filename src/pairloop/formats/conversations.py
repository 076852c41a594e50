"""Family B: two conversations, ``{"chosen":{"messages":[…]},"rejected":{"messages":[…]}}`` or the lists themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats.family import Family, first_is_better, prompt_messages
from pairloop.formats.row import MISSING, Draft, Row
from pairloop.types import Message, PreferencePair


def matches(row: Mapping[str, Any]) -> bool:
    return "prompt" not in row and ("chosen" in row or "rejected" in row)


def parse(row: Row) -> Draft:
    chosen_prompt, chosen = _split(row, "chosen")
    rejected_prompt, rejected = _split(row, "rejected")
    if chosen_prompt is not None and rejected_prompt is not None and chosen_prompt != rejected_prompt:
        turn = next(
            (i for i, (a, b) in enumerate(zip(chosen_prompt, rejected_prompt, strict=False)) if a != b),
            min(len(chosen_prompt), len(rejected_prompt)),
        )
        row.refuse("$", "prompts_differ", f"the conversations must share all but the last turn; they differ at turn {turn}")
        chosen_prompt = None
    return Draft(chosen_prompt, row.answers([chosen, rejected], distinct=True), first_is_better(row))


def _split(row: Row, key: str) -> tuple[tuple[Message, ...] | None, tuple[str, Any]]:
    """All turns but the last as the prompt; path and content of the last one, which must be the assistant's."""
    value, path = row.get(row.value, "$", key), f"$.{key}"
    if isinstance(value, Mapping):
        value, path = row.get(value, path, "messages"), f"{path}.messages"
    if value is MISSING:
        return None, (path, MISSING)
    if not isinstance(value, list) or len(value) < 2:
        row.refuse(path, "not_a_list", "expected a list of at least two messages: a prompt and the assistant's answer")
        return None, (path, MISSING)
    return row.conversation(path, value[:-1]), row.assistant_turn(f"{path}[{len(value) - 1}]", value[-1])


def write(pair: PreferencePair) -> dict[str, Any]:
    prompt = prompt_messages(pair)
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {key: {"messages": [*prompt, {"role": "assistant", "content": side.text}]} for key, side in sides.items()}


FAMILY = Family("conversations", matches, parse, write)
