"""The chat replies of the OpenAI wire, whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pairloop.config import Config
from pairloop.loop.serve import MAX_CALLS, Answer, call_id
from pairloop.policy.calls import read_answer
from pairloop.policy.protocols import TokenEvent, Tokens
from pairloop.types import Completion, FinishReason, Group, GroupKind, Version, offered_tools

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
        message = message_body(answer.group, index, tokens)
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": None if entries is None else {"content": entries, "refusal": None},
                "finish_reason": finish_reason(completion, has_calls="tool_calls" in message),
            }
        )
    return {**head.body("chat.completion"), "choices": choices, "usage": usage_body(answer.group)}


def message_body(group: Group, index: int, tokens: Tokens) -> dict[str, Any]:
    """What completion ``index`` says; its calls are read out of the text where the conversation offers tools."""
    completion, tools = group.completions[index], offered_tools(group.prompt)
    if not tools:
        return {"role": "assistant", "content": completion.text, "refusal": None}
    read = read_answer(tokens, group.prompt_token_ids, tools, completion)
    message: dict[str, Any] = {"role": "assistant", "content": read.content, "refusal": None}
    if read.reasoning is not None:
        message["reasoning_content"] = read.reasoning
    if read.calls:
        message["tool_calls"] = [
            {
                "id": call_id(group.group_id, index, place),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for place, call in enumerate(read.calls[:MAX_CALLS])
        ]
    return message


def finish_reason(completion: Completion, *, has_calls: bool) -> str:
    if completion.finish_reason is FinishReason.LENGTH:
        return "length"
    return "tool_calls" if has_calls else "stop"


def usage_body(group: Group) -> dict[str, int]:
    prompt, answered = len(group.prompt_token_ids), sum(len(completion.token_ids) for completion in group.completions)
    return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}


def token_logprobs(text: str, events: Iterable[TokenEvent], eos: frozenset[int]) -> list[dict[str, Any]]:
    """One entry per token; joined they are exactly ``text`` (a stop string and the end token are left out)."""
    return [entry(token, event) for token, event in _cut(text, events, eos)]


def _cut(text: str, events: Iterable[TokenEvent], eos: frozenset[int]) -> Iterator[tuple[str, TokenEvent]]:
    room = len(text)
    for event in events:
        if event.token_id in eos and not event.text:  # with text: what a stop string might have begun, said at the end
            continue
        if room <= 0:
            return
        yield event.text[:room], event
        room -= len(event.text)


def entry(token: str, event: TokenEvent) -> dict[str, Any]:
    """The log-prob entry of a token that said ``token``, with the likeliest ones at its place where they were asked for."""
    return {**_logprob(token, event.logp), "top_logprobs": [_logprob(top.text, top.logp) for top in event.top]}


def _logprob(token: str, logp: float) -> dict[str, Any]:
    return {"token": token, "logprob": logp, "bytes": list(token.encode(errors="replace"))}
