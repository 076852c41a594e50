"""Family D: TRL's explicit prompt, ``{"prompt":…,"chosen":…,"rejected":…}``: all strings, or all lists of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family, assistant, decided, first_is_better, messages, tool_keys
from pairloop.formats.row import MISSING, Draft, Found, Row, kind_of


def matches(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and ("chosen" in row or "rejected" in row)


def parse(row: Row) -> Draft:
    raw = row.get(row.value, "$", "prompt")
    found = [answer(row, key, raw) for key in ("chosen", "rejected")]
    prompt = turns.prompt(row, "$.prompt", raw, turns.offered(row, row.value, "$"))
    return Draft(prompt, row.answers(found, distinct=True), first_is_better(row))


def answer(row: Row, key: str, prompt: Any) -> Found:
    """Path and content of an answer, which has its prompt's form: a string, or a list with one assistant message."""
    value, path = row.get(row.value, "$", key), f"$.{key}"
    if value is MISSING:
        return path, MISSING
    if {type(prompt), type(value)} == {str, list}:
        row.refuse(path, "mixed_forms", f"the prompt is {kind_of(prompt)}, so this must be one too; found {kind_of(value)}")
        return path, MISSING
    return row.answer_message(path, value) if isinstance(value, list) else (path, value)


def write(draft: Draft) -> dict[str, Any]:
    chosen, rejected = decided(draft)
    if isinstance(draft.prompt, str):
        return {"prompt": draft.prompt, "chosen": chosen, "rejected": rejected, **tool_keys(draft)}
    sides = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return {"prompt": messages(draft), **sides, **tool_keys(draft)}


FAMILY = Family("trl", matches, parse, write)
