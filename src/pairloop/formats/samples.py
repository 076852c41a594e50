"""Family C: scored samples, ``{"samples":[{"messages":[…],"score":1.0},…]}``: whole conversations that share their prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.conversations import shared_prompt
from pairloop.formats.family import Family, assistant, messages, scores_of, texts, tool_keys
from pairloop.formats.row import Draft, Found, Mark, Row, kind_of
from pairloop.types import SCORE_METRIC, Message


def matches(row: Mapping[str, Any]) -> bool:
    samples = row.get("samples")
    is_whole = isinstance(samples, list) and bool(samples) and isinstance(samples[0], Mapping) and "messages" in samples[0]
    return is_whole and "messages" not in row and "prompt" not in row


def parse(row: Row) -> Draft:
    tools = turns.offered(row, row.value, "$")
    samples = row.get(row.value, "$", "samples")
    if not isinstance(samples, list) or not samples:
        row.refuse("$.samples", "not_a_list", f"expected a list of scored conversations, found {kind_of(samples)}")
        return Draft(None, (), ())
    rater = row.rater(row.value, "$")
    prompts: list[tuple[Message, ...] | None] = []
    found: list[Found] = []
    marks: list[Mark] = []
    for index, sample in enumerate(samples):
        path = f"$.samples[{index}]"
        prompt, answer = turns.split(row, f"{path}.messages", row.get(sample, path, "messages"), tools)
        prompts.append(prompt)
        found.append(answer)
        score = row.score(sample, path, ("score", "reward")) if isinstance(sample, Mapping) else None
        if score is not None:
            marks.append(Mark(SCORE_METRIC, choice_index=index, value=score, rater_id=rater))
    return Draft(shared_prompt(row, prompts), row.answers(found), tuple(marks))


def write(draft: Draft) -> dict[str, Any]:
    prompt, scores = messages(draft), scores_of(draft)
    samples = [
        {"messages": [*prompt, assistant(text)], "score": score} for text, score in zip(texts(draft), scores, strict=True)
    ]
    return {"samples": samples, **tool_keys(draft)}


FAMILY = Family("samples", matches, parse, write)
