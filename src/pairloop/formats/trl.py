"""Family D: TRL's explicit prompt, ``{"prompt":…,"chosen":…,"rejected":…}``: all strings, or all lists of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats.family import Family, first_is_better
from pairloop.formats.row import MISSING, Draft, Row, kind_of
from pairloop.types import PreferencePair, messages_as_dicts


def matches(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and ("chosen" in row or "rejected" in row)


def parse(row: Row) -> Draft:
    prompt = row.get(row.value, "$", "prompt")
    found = [answer(row, key, prompt) for key in ("chosen", "rejected")]
    return Draft(row.prompt("$.prompt", prompt), row.answers(found, distinct=True), first_is_better(row))


def answer(row: Row, key: str, prompt: Any) -> tuple[str, Any]:
    """Path and content of an answer, which has its prompt's form: a string, or a list with one assistant message."""
    value, path = row.get(row.value, "$", key), f"$.{key}"
    if value is MISSING:
        return path, MISSING
    if {type(prompt), type(value)} == {str, list}:
        row.refuse(path, "mixed_forms", f"the prompt is {kind_of(prompt)}, so this must be one too; found {kind_of(value)}")
        return path, MISSING
    return row.answer_message(path, value) if isinstance(value, list) else (path, value)


def write(pair: PreferencePair) -> dict[str, Any]:
    if isinstance(pair.prompt, str):
        return {"prompt": pair.prompt, "chosen": pair.chosen.text, "rejected": pair.rejected.text}
    return {
        "prompt": messages_as_dicts(pair.prompt),
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
    }


FAMILY = Family("trl", matches, parse, write)
