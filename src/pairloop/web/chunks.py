"""The chat replies of the OpenAI wire as they grow: token events in, server-sent events out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pairloop.loop.serve import MAX_CALLS, call_id
from pairloop.policy.calls import CallReader, Said
from pairloop.policy.protocols import TokenEvent, Tokens
from pairloop.types import FinishReason, Group, offered_tools
from pairloop.web.replies import Head, entry, finish_reason, token_logprobs, usage_body

DONE = "data: [DONE]\n\n"


class Chunks:
    """Turns the token events of one stream into server-sent events; each index says its role first and its end last.

    A text that may be the beginning of a stop string, or of a tool call, is held back until it is known not to be. Log-probs
    go with the first chunk after their tokens.
    """

    def __init__(self, head: Head, group: Group, n: int, tokens: Tokens, *, with_logprobs: bool, with_usage: bool) -> None:
        self._head = head
        self._eos = tokens.eos_token_ids
        self._with_logprobs = with_logprobs
        self._with_usage = with_usage
        self._texts = [_Held(group.sampling.stop) for _ in range(n)]
        self._voices = [_Voice(group, index, tokens) for index in range(n)]
        self._entries: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        # Tokens without text: they count once text follows (a character in parts), and not where none does (a stop string).
        self._silent: list[list[TokenEvent]] = [[] for _ in range(n)]

    def opening(self) -> str:
        return "".join(self._chunk(index, voice.opening) for index, voice in enumerate(self._voices))

    def tokens(self, batch: Iterable[TokenEvent]) -> str:
        """The chunks of a batch: those of each index that has something to say."""
        touched: dict[int, list[TokenEvent]] = {}
        for event in batch:
            touched.setdefault(event.index, []).extend(self._texts[event.index].add(event))
        return "".join(self._spoken(index, events) for index, events in touched.items() if events)

    def closing(self, group: Group) -> str:
        """What was held back, the finish reasons, the usage where it was asked for, and the end."""
        pieces: list[str] = []
        for index, (completion, held) in enumerate(zip(group.completions, self._texts, strict=True)):
            rest = completion.text[held.sent :]
            if rest:
                self._entries[index] += token_logprobs(rest, [*self._silent[index], *held.pending], self._eos)
            voice = self._voices[index]
            is_cut = completion.finish_reason is FinishReason.LENGTH
            pieces += self._said(index, [*voice.say(rest), *voice.end(is_cut=is_cut)])
            pieces.append(self._chunk(index, {}, finish=finish_reason(completion, has_calls=voice.calls > 0)))
        if self._with_usage:
            body = {**self._head.body("chat.completion.chunk"), "choices": [], "usage": usage_body(group)}
            pieces.append(_event(body))
        return "".join(pieces) + DONE

    def _spoken(self, index: int, events: Iterable[TokenEvent]) -> str:
        text = ""
        for event in events:
            text += self._voices[index].text_of(event)
            self._silent[index].append(event)
            if event.text:
                self._entries[index] += (entry(one.text, one) for one in self._silent[index])
                self._silent[index] = []
        return "".join(self._said(index, self._voices[index].say(text)))

    def _said(self, index: int, deltas: Iterable[dict[str, Any]]) -> Iterator[str]:
        for delta in deltas:
            yield self._chunk(index, delta)

    def _chunk(self, index: int, delta: dict[str, Any], *, finish: str | None = None) -> str:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish}
        if self._with_logprobs and self._entries[index]:
            choice["logprobs"] = {"content": self._entries[index], "refusal": None}
            self._entries[index] = []
        body = {**self._head.body("chat.completion.chunk"), "choices": [choice]}
        if self._with_usage:
            body["usage"] = None
        return _event(body)


class _Voice:
    """How one index says its text: as it is, or read for tool calls where the conversation offers tools."""

    def __init__(self, group: Group, index: int, tokens: Tokens) -> None:
        tools = offered_tools(group.prompt)
        self._group_id, self._index, self._tokens = group.group_id, index, tokens
        self._reader = CallReader(tokens, group.prompt_token_ids, tools) if tools else None
        self.calls = 0

    @property
    def opening(self) -> dict[str, Any]:
        """The role; with tools there may be no content to come."""
        return {"role": "assistant", "content": "" if self._reader is None else None, "refusal": None}

    def text_of(self, event: TokenEvent) -> str:
        """What a token adds; special tokens count where the model's template reads them."""
        if event.text or self._reader is None or not self._reader.takes_special_tokens:
            return event.text
        is_special = not self._tokens.decode((event.token_id,))
        return self._tokens.decode((event.token_id,), special=True) if is_special else ""

    def say(self, text: str) -> list[dict[str, Any]]:
        if self._reader is None:
            return [{"content": text}] if text else []
        return self._deltas(self._reader.feed(text))

    def end(self, *, is_cut: bool) -> list[dict[str, Any]]:
        return self._deltas(self._reader.finish(is_cut=is_cut)) if self._reader is not None else []

    def _deltas(self, said: Iterable[Said]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for piece in said:
            if piece.content:
                deltas.append({"content": piece.content})
            elif piece.reasoning:
                deltas.append({"reasoning_content": piece.reasoning})
            elif piece.name is not None and self.calls < MAX_CALLS:
                deltas += self._call(piece.name, piece.arguments)
        return deltas

    def _call(self, name: str, arguments: str) -> list[dict[str, Any]]:
        """A call's name first, then its arguments, the way clients put them together."""
        place = self.calls
        self.calls += 1
        begun = {
            "index": place,
            "id": call_id(self._group_id, self._index, place),
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        return [{"tool_calls": [begun]}, {"tool_calls": [{"index": place, "function": {"arguments": arguments}}]}]


class _Held:
    """The tokens of one index that wait: those that a stop string might still swallow."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._reach = max((len(stop) - 1 for stop in stops), default=0)
        self._text = ""
        self.sent = 0
        self.pending: list[TokenEvent] = []

    def add(self, event: TokenEvent) -> list[TokenEvent]:
        """The tokens that may be said now that ``event`` has come."""
        self._text += event.text
        self.pending.append(event)
        if self._stops and any(stop in self._text for stop in self._stops):
            return []
        safe = len(self._text) - self._reach
        free: list[TokenEvent] = []
        while self.pending and self.sent + len(self.pending[0].text) <= safe:
            free.append(self.pending.pop(0))
            self.sent += len(free[-1].text)
        return free


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
