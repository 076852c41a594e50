"""The chat replies of the OpenAI wire: whole bodies, and the chunks of a stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pairloop.config import Config
from pairloop.loop.serve import Answer
from pairloop.policy.protocols import TokenEvent, Tokens
from pairloop.types import Completion, FinishReason, Group, GroupKind, Version

DONE = "data: [DONE]\n\n"
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Head:
    """What every body and every chunk of one reply repeats. In a duel it names neither version nor weights."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def body(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def head_of(group: Group, version: Version | None, tokens: Tokens, config: Config) -> Head:
    """The head of a group's reply; ``version`` is None where it may not be told."""
    parts = (tokens.hash, config.policy.model, config.policy.dtype, version.artifact_hash if version else "")
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    model = version.name if version else group.policy
    return Head(group.group_id, int(group.created_at.timestamp()), model, f"fp_{digest}")


def may_name_version(group: Group) -> bool:
    return group.kind is not GroupKind.DUEL


def completion_body(head: Head, answer: Answer, tokens: Tokens, *, with_logprobs: bool) -> dict[str, Any]:
    """A chat.completion: every choice, and the usage of all of them."""
    choices = []
    for index, completion in enumerate(answer.group.completions):
        entries = token_logprobs(completion.text, answer.events[index], tokens.eos_token_ids) if with_logprobs else None
        choices.append(choice_body(index, completion, entries))
    return {**head.body("chat.completion"), "choices": choices, "usage": usage_body(answer.group)}


def choice_body(index: int, completion: Completion, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
        "finish_reason": finish_reason(completion),
    }


def finish_reason(completion: Completion) -> str:
    return "length" if completion.finish_reason is FinishReason.LENGTH else "stop"


def usage_body(group: Group) -> dict[str, int]:
    prompt, answered = len(group.prompt_token_ids), sum(len(completion.token_ids) for completion in group.completions)
    return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}


def token_logprobs(text: str, events: Iterable[TokenEvent], eos: frozenset[int]) -> list[dict[str, Any]]:
    """One entry per token; joined they are exactly ``text`` (a stop string and the end token are left out)."""
    return [_logprob(token, event.logp) for token, event in _cut(text, events, eos)]


def _cut(text: str, events: Iterable[TokenEvent], eos: frozenset[int]) -> Iterator[tuple[str, TokenEvent]]:
    room = len(text)
    for event in events:
        if event.token_id in eos:
            continue
        if room <= 0:
            return
        yield event.text[:room], event
        room -= len(event.text)


def _logprob(token: str, logp: float) -> dict[str, Any]:
    return {"token": token, "logprob": logp, "bytes": list(token.encode(errors="replace")), "top_logprobs": []}


class Chunks:
    """Turns the token events of one stream into server-sent events; each index says its role first and its end last.

    A text that may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(
        self, head: Head, n: int, tokens: Tokens, *, stops: Sequence[str], with_logprobs: bool, with_usage: bool
    ) -> None:
        self._head = head
        self._eos = tokens.eos_token_ids
        self._with_logprobs = with_logprobs
        self._with_usage = with_usage
        self._texts = [_Held(stops) for _ in range(n)]

    def opening(self) -> str:
        return "".join(self._chunk(i, {"role": "assistant", "content": "", "refusal": None}) for i in range(len(self._texts)))

    def tokens(self, batch: Iterable[TokenEvent]) -> str:
        """The chunks of a batch: one for each index that has something to say."""
        touched: dict[int, list[TokenEvent]] = {}
        for event in batch:
            touched.setdefault(event.index, []).extend(self._texts[event.index].add(event))
        pieces = []
        for index, events in touched.items():
            spoken = [event for event in events if event.token_id not in self._eos]
            if spoken:
                entries = [_logprob(event.text, event.logp) for event in spoken]
                pieces.append(self._said(index, "".join(event.text for event in spoken), entries))
        return "".join(pieces)

    def closing(self, group: Group) -> str:
        """What was held back, the finish reasons, the usage where it was asked for, and the end."""
        pieces = []
        for index, (completion, held) in enumerate(zip(group.completions, self._texts, strict=True)):
            rest = completion.text[held.sent :]
            if rest:
                pieces.append(self._said(index, rest, token_logprobs(rest, held.pending, self._eos)))
            pieces.append(self._chunk(index, {}, finish=finish_reason(completion)))
        if self._with_usage:
            body = {**self._head.body("chat.completion.chunk"), "choices": [], "usage": usage_body(group)}
            pieces.append(_event(body))
        return "".join(pieces) + DONE

    def _said(self, index: int, text: str, entries: list[dict[str, Any]]) -> str:
        logprobs = {"content": entries, "refusal": None} if self._with_logprobs else None
        return self._chunk(index, {"content": text}, logprobs=logprobs)

    def _chunk(self, index: int, delta: dict[str, Any], *, logprobs: Any = None, finish: str | None = None) -> str:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish}
        if logprobs is not None:
            choice["logprobs"] = logprobs
        body = {**self._head.body("chat.completion.chunk"), "choices": [choice]}
        if self._with_usage:
            body["usage"] = None
        return _event(body)


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
