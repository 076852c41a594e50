"""Supervised rows: ``{"messages":[…]}``, of which the last turn, the assistant's, is what to learn.

Earlier assistant turns are context. A row whose last turn has ``"weight": 0`` says that it is not to be learned, and is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import CannotHold, Family, assistant, marks_of, messages, texts, tool_keys
from pairloop.formats.row import Draft, Mark, Row
from pairloop.types import DEMONSTRATION_METRIC


def matches(row: Mapping[str, Any]) -> bool:
    return "messages" in row


def parse(row: Row) -> Draft:
    given = row.get(row.value, "$", "messages")
    prompt, found = turns.split(row, "$.messages", given, turns.offered(row, row.value, "$"))
    last = given[-1] if isinstance(given, list) and given else None
    if isinstance(last, Mapping) and last.get("weight") == 0:
        row.refuse(f"$.messages[{len(given) - 1}].weight", "untrained_answer", "the last turn has weight 0: nothing to learn")
    [text] = row.answers([found])
    mark = Mark(DEMONSTRATION_METRIC, choice_index=0, value=text, rater_id=row.rater(row.value, "$"))
    return Draft(prompt, (text,), (mark,))


def write(draft: Draft) -> dict[str, Any]:
    [mark, *more] = marks_of(draft, DEMONSTRATION_METRIC)
    [text, *others] = texts(draft)
    if more or others or mark.value != text:
        raise CannotHold("edit" if mark.value != text else "several_answers")
    return {"messages": [*messages(draft), assistant(text)], **tool_keys(draft)}


FAMILY = Family("sft", matches, parse, write)
