"""Prompts alone, ``{"messages":[…]}`` that ends with the user, or ``{"prompt":…}``: for answers that a verifier will score.

Only where it is asked for by name: a file of nothing but prompts is otherwise a file without answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family
from pairloop.formats.row import Draft, Row


def matches(_: Mapping[str, Any]) -> bool:
    return False


def parse(row: Row) -> Draft:
    tools = turns.offered(row, row.value, "$")
    key, value = row.one_of(row.value, "$", ("messages", "prompt"))
    read = turns.prompt if key == "prompt" else turns.conversation
    return Draft(read(row, f"$.{key}", value, tools), (), ())


FAMILY = Family("prompts", matches, parse)
