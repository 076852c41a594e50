"""Family I: a scored group, ``{"messages":[…],"responses":[{"content":"…","score":0.8},…]}``; higher is better.

The list is called responses, completions or samples; a text content, text or response; a number score or reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import samples, turns
from pairloop.formats.family import Family, messages, scores_of, texts, tool_keys
from pairloop.formats.row import MISSING, Draft, Found, Mark, Row, kind_of
from pairloop.types import SCORE_METRIC, Prompt

_LISTS = ("responses", "completions", "samples")
_TEXTS = ("content", "text", "response")
_SCORES = ("score", "reward")


def matches(row: Mapping[str, Any]) -> bool:
    return any(key in row for key in _LISTS) and not samples.matches(row)


def parse(row: Row) -> Draft:
    prompt = _prompt(row)
    key, entries = row.one_of(row.value, "$", _LISTS)
    if entries is MISSING:
        return Draft(prompt, (), ())
    if not isinstance(entries, list) or not entries:
        row.refuse(f"$.{key}", "not_a_list", "expected a list of at least one scored answer")
        return Draft(prompt, (), ())
    rater = row.rater(row.value, "$")
    found: list[Found] = []
    marks: list[Mark] = []
    for index, entry in enumerate(entries):
        path = f"$.{key}[{index}]"
        if not isinstance(entry, Mapping):
            row.refuse(path, "not_an_object", f"expected an object with a text and a score, found {kind_of(entry)}")
            continue
        text_key, text = row.one_of(entry, path, _TEXTS)
        found.append((f"{path}.{text_key}", text))
        score = row.score(entry, path, _SCORES)
        if score is not None:
            marks.append(Mark(SCORE_METRIC, choice_index=index, value=score, rater_id=rater))
    return Draft(prompt, row.answers(found), tuple(marks))


def _prompt(row: Row) -> Prompt | None:
    tools = turns.offered(row, row.value, "$")
    key, value = row.one_of(row.value, "$", ("messages", "prompt"))
    read = turns.prompt if key == "prompt" else turns.conversation
    return read(row, f"$.{key}", value, tools)


def write(draft: Draft) -> dict[str, Any]:
    answers = [{"content": text, "score": score} for text, score in zip(texts(draft), scores_of(draft), strict=True)]
    if isinstance(draft.prompt, str):
        return {"prompt": draft.prompt, "responses": answers, **tool_keys(draft)}
    return {"messages": messages(draft), "responses": answers, **tool_keys(draft)}


FAMILY = Family("scored", matches, parse, write)
