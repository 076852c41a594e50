"""Family D, thumbs: one answer and whether it is good, as KTO trains on it.

TRL's rows are ``{"prompt":…,"completion":…,"label":true}``, LLaMA-Factory's ``{"messages":[…],"label":true}``; the first is
what we write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import CannotHold, Family, assistant, marks_of, messages, texts, tool_keys
from pairloop.formats.row import MISSING, Draft, Found, Mark, Row, kind_of
from pairloop.formats.trl import answer
from pairloop.types import THUMBS_METRIC, Prompt


def matches(row: Mapping[str, Any]) -> bool:
    return "completion" in row or ("messages" in row and "label" in row and "comparison" not in row)


def parse(row: Row) -> Draft:
    prompt, found = _parts(row)
    label = row.get(row.value, "$", "label")
    marks: tuple[Mark, ...] = ()
    if isinstance(label, bool):
        marks = (Mark(THUMBS_METRIC, choice_index=0, value=label, rater_id=row.rater(row.value, "$")),)
    elif label is not MISSING:
        row.refuse("$.label", "bad_label", f"label must be true or false, found {kind_of(label)}")
    return Draft(prompt, row.answers([found]), marks)


def _parts(row: Row) -> tuple[Prompt | None, Found]:
    tools = turns.offered(row, row.value, "$")
    if "messages" in row.value and "completion" not in row.value:
        return turns.split(row, "$.messages", row.value["messages"], tools)
    raw = row.get(row.value, "$", "prompt")
    return turns.prompt(row, "$.prompt", raw, tools), answer(row, "completion", raw)


def write(draft: Draft) -> dict[str, Any]:
    [mark, *more] = marks_of(draft, THUMBS_METRIC)
    if more or len(draft.completions) > 1:
        raise CannotHold("several_answers" if len(draft.completions) > 1 else "several_raters")
    [text] = texts(draft)
    if isinstance(draft.prompt, str):
        return {"prompt": draft.prompt, "completion": text, "label": mark.value, **tool_keys(draft)}
    return {"prompt": messages(draft), "completion": [assistant(text)], "label": mark.value, **tool_keys(draft)}


FAMILY = Family("thumbs", matches, parse, write)
