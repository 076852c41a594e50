"""What an answer says where tools were offered: its content, its reasoning, and the calls it makes.

Read by transformers' own response parser, driven by the model's ``response_template`` (tokenizer_config.json) where it has one,
else by ours for the form that most open templates teach: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``. The text
that was sampled stays as it was; a call that cannot be read is content. Whole answers and streams take the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pairloop.policy.protocols import Tokens
from pairloop.types import Completion

CALL_BEGINS, CALL_ENDS = "<tool_call>", "</tool_call>"
_CALLS, _CONTENT = "tool_calls", "content"
_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})

_COMMON_TEMPLATE: Mapping[str, Any] = {
    "start_anchor": CALL_BEGINS,  # asked for by the parser, and never looked for: no prompt is read
    "fields": {
        _CALLS: {
            "open": CALL_BEGINS,
            "close": CALL_ENDS,
            "repeats": True,
            "content": "json",
            "content_args": {"allow_non_json": True},
        },
        _CONTENT: {"content": "text"},
    },
}


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of an answer: content, reasoning, or one whole call (``arguments`` is JSON text)."""

    content: str = ""
    reasoning: str = ""
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Reads one answer as it grows: `feed` it text, then `finish`; each gives the pieces that are certain.

    White space is held back until content follows: beside calls it says nothing. Without calls the content is the whole text.
    """

    def __init__(self, tokens: Tokens, prompt_token_ids: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> None:
        from transformers.utils.chat_parsing import ResponseParser  # here: half a second, and only where tools are offered

        self.takes_special_tokens = tokens.response_template is not None
        """Whether the text to feed must hold the special tokens, too."""
        prefix = tokens.decode(prompt_token_ids, special=True) if self.takes_special_tokens else ""
        template = dict(tokens.response_template or _COMMON_TEMPLATE)
        self._parser = ResponseParser(template, prefix=prefix, tools=[dict(tool) for tool in tools])
        self._fed = ""
        self._told = ""
        self._blank = ""
        self._call = ""
        self._has_calls = False
        self._is_broken = False

    def feed(self, text: str) -> list[Said]:
        self._fed += text
        if self._is_broken:
            return self._content(text)
        try:
            events = self._parser.feed(text)
        except ValueError:
            return self._broken()
        return self._said(events)

    def finish(self) -> list[Said]:
        said: list[Said] = []
        if not self._is_broken:
            try:
                _, events = self._parser.finalize()
                said = self._said(events, is_cut=True)
            except ValueError:
                said = self._broken()
        if self._blank and not self._has_calls:
            said.append(Said(content=self._blank))
        return said

    def _said(self, events: Iterable[Mapping[str, Any]], *, is_cut: bool = False) -> list[Said]:
        said: list[Said] = []
        for event in events:
            field, kind = event["field"], event["type"]
            if kind == "region_open":
                self._call = ""
            elif kind == "region_chunk" and field == _CONTENT:
                said += self._content(event["text"])
            elif kind == "region_chunk" and field in _REASONING:
                said.append(Said(reasoning=event["text"]))
            elif kind == "region_chunk" and field == _CALLS:
                self._call += event["text"]
            elif kind == "region_close" and field == _CALLS:
                calls = _calls(event["value"])
                self._has_calls |= bool(calls)
                said += calls or self._content(CALL_BEGINS + self._call + (CALL_ENDS if not is_cut else ""))
        return said

    def _content(self, text: str) -> list[Said]:
        text = self._blank + text
        certain = text.rstrip()
        self._blank = text[len(certain) :]
        self._told += certain
        return [Said(content=certain)] if certain else []

    def _broken(self) -> list[Said]:
        """The template cannot read the answer: what was not told of it is content."""
        self._is_broken = True
        self._blank = ""
        return self._content(self._fed.removeprefix(self._told))


def end_of_call(tokens: Tokens) -> str | None:
    """The text that ends a call of this model; None where its template gives no plain one."""
    if tokens.response_template is None:
        return CALL_ENDS
    end = tokens.response_template.get("fields", {}).get(_CALLS, {}).get("close")
    return end if isinstance(end, str) else None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer as its reader sees it."""

    content: str | None
    reasoning: str | None
    calls: tuple[Said, ...]


def read_answer(
    tokens: Tokens, prompt_token_ids: Sequence[int], tools: Sequence[Mapping[str, Any]], completion: Completion
) -> Answer:
    """What ``completion`` says where ``tools`` were offered."""
    reader = CallReader(tokens, prompt_token_ids, tools)
    said = [*reader.feed(_text(tokens, completion, special=reader.takes_special_tokens)), *reader.finish()]
    content, reasoning = "".join(piece.content for piece in said), "".join(piece.reasoning for piece in said)
    return Answer(content or None, reasoning or None, tuple(piece for piece in said if piece.name is not None))


def _text(tokens: Tokens, completion: Completion, *, special: bool) -> str:
    """The text with its special tokens, unless a stop string cut it: then the text alone."""
    if not special or tokens.decode(completion.token_ids) != completion.text:
        return completion.text
    return tokens.decode(completion.token_ids, special=True)


def _calls(value: Any) -> list[Said]:
    """The calls of one region (a template may hold several in it); none where they are not calls."""
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            return []
        arguments = function.get("arguments", function.get("parameters", {}))
        if not isinstance(arguments, dict | str):
            return []
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        found.append(Said(name=function["name"], arguments=text))
    return found
