"""Imported, not written: stored completions of the OpenAI API, each with its messages beside it.

``GET /v1/chat/completions`` lists objects ``chat.completion`` (schema ChatCompletionList of OpenAI's openapi.json) without the
messages that they answer; those come from ``GET /v1/chat/completions/{id}/messages`` (ChatCompletionMessageList). A row is the
first with the second under the key ``messages``: the list itself, or the page that holds it. Nobody says in it how good an
answer is. They are kept to be learned from (distillation), so an answer that ended by itself is a demonstration by a language
model; several choices, of which nothing tells the better one, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family
from pairloop.formats.row import MISSING, Draft, Found, Mark, Row
from pairloop.types import DEMONSTRATION_METRIC, Source


def matches(row: Mapping[str, Any]) -> bool:
    return row.get("object") == "chat.completion" and "choices" in row


def parse(row: Row) -> Draft:
    tools = turns.offered(row, row.value, "$")
    given, path = _messages(row)
    prompt = turns.conversation(row, path, given, tools)
    [text] = row.answers([_answer(row)])
    mark = Mark(DEMONSTRATION_METRIC, choice_index=0, value=text)
    return Draft(prompt, (text,), (mark,), source=Source.LLM)


def _messages(row: Row) -> tuple[Any, str]:
    if "messages" not in row.value:
        said = "put what GET /v1/chat/completions/{id}/messages returns under the key 'messages'"
        row.refuse("$", "missing_key", f"a stored completion does not hold its prompt: {said}")
        return MISSING, "$.messages"
    given = row.value["messages"]
    return (row.get(given, "$.messages", "data"), "$.messages.data") if isinstance(given, Mapping) else (given, "$.messages")


def _answer(row: Row) -> Found:
    choices = row.value["choices"]
    if not isinstance(choices, list) or not choices:
        row.refuse("$.choices", "not_a_list", "expected a list with one choice")
        return "$.choices", MISSING
    if len(choices) > 1:
        said = "nothing says which one is better; write them as a scored group"
        row.refuse("$.choices", "several_answers", f"the completion has {len(choices)} choices, and {said}")
        return "$.choices", MISSING
    path = "$.choices[0]"
    found = row.assistant_turn(f"{path}.message", row.get(choices[0], path, "message"))
    ended = choices[0].get("finish_reason") if isinstance(choices[0], Mapping) else None
    if ended in ("length", "content_filter"):
        row.refuse(f"{path}.finish_reason", "unfinished_answer", f"the answer did not end by itself ({ended})")
    return found


FAMILY = Family("openai_stored", matches, parse)
