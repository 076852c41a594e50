"""What an answer says where tools were offered: its content, its reasoning, and the calls it makes.

Read by transformers' own response parser, in the form that `call_forms` finds. The text that was sampled stays as it was; a
call that cannot be read is content. Whole answers and streams take the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pairloop.policy.call_forms import CALLS, CONTENT, form_of
from pairloop.policy.protocols import Tokens
from pairloop.types import Completion, FinishReason

_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})


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

        self._form = form_of(tokens)
        self.takes_special_tokens = self._form.takes_special_tokens
        """Whether the text to feed must hold the special tokens, too."""
        prefix = "" if tokens.response_template is None else tokens.decode(prompt_token_ids, special=True)
        self._parser = ResponseParser(dict(self._form.template), prefix=prefix, tools=[dict(tool) for tool in tools])
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

    def finish(self, *, is_cut: bool) -> list[Said]:
        """``is_cut``: the answer ran into its length; then a call that it did not end is none."""
        said: list[Said] = []
        if not self._is_broken:
            try:
                _, events = self._parser.finalize()
                said = self._said(events, is_end=True, is_cut=is_cut)
            except ValueError:
                said = self._broken()
        if self._blank and not self._has_calls:
            said.append(Said(content=self._blank))
        return said

    def _said(self, events: Iterable[Mapping[str, Any]], *, is_end: bool = False, is_cut: bool = False) -> list[Said]:
        said: list[Said] = []
        for event in events:
            field, kind = event["field"], event["type"]
            if kind == "region_open":
                self._call = ""
            elif kind == "region_chunk" and field == CONTENT:
                said += self._content(event["text"])
            elif kind == "region_chunk" and field in _REASONING:
                said.append(Said(reasoning=event["text"]))
            elif kind == "region_chunk" and field == CALLS:
                self._call += event["text"]
            elif kind == "region_close" and field == CALLS:
                calls = [] if is_cut else _calls(event["value"])
                self._has_calls |= bool(calls)
                said += calls or self._content(self._unread(is_end=is_end))
        return said

    def _unread(self, *, is_end: bool) -> str:
        """The text of a call that is none."""
        if is_end:
            body_at = len(self._fed) - len(self._call)
            return self._fed[self._fed.rfind(self._form.begins, 0, body_at) :]
        return self._form.begins + self._call + (self._form.ends or "")

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


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """A whole answer as its reader sees it."""

    content: str | None
    reasoning: str | None
    calls: tuple[Said, ...]


def read_answer(
    tokens: Tokens, prompt_token_ids: Sequence[int], tools: Sequence[Mapping[str, Any]], completion: Completion
) -> ReadAnswer:
    """What ``completion`` says where ``tools`` were offered."""
    reader = CallReader(tokens, prompt_token_ids, tools)
    said = [
        *reader.feed(_text(tokens, completion, special=reader.takes_special_tokens)),
        *reader.finish(is_cut=completion.finish_reason is FinishReason.LENGTH),
    ]
    content, reasoning = "".join(piece.content for piece in said), "".join(piece.reasoning for piece in said)
    return ReadAnswer(content or None, reasoning or None, tuple(piece for piece in said if piece.name is not None))


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
