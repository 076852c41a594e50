"""What a model reads: turns, the calls and tools in them, prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant turn asked to be called; ``arguments`` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. An assistant's may call tools; a turn of role ``tool`` answers the call ``tool_call_id``."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The turn in the OpenAI shape; what it does not have is left out."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn

    @classmethod
    def from_dict(cls, turn: Mapping[str, Any]) -> Self:
        """The turn that `as_dict` wrote."""
        calls = (
            ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", ())
        )
        return cls(turn["role"], turn["content"], tuple(calls), turn.get("tool_call_id"))


Prompt = tuple[Message, ...] | str
"""A conversation, rendered by the model's chat template, or a plain string, used as it is.

Tools are part of what the model reads: a conversation that offers some begins with a message of role `TOOLS_ROLE` whose content
is their list as JSON, so that whatever stores, compares or hashes prompts tells two sets of tools apart.
"""
TOOLS_ROLE = "tools"


def with_tools(tools: Sequence[Mapping[str, Any]], turns: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation ``turns`` that offers ``tools`` (in the OpenAI shape); without any, the turns alone."""
    if not tools:
        return tuple(turns)
    return Message(TOOLS_ROLE, json.dumps(list(tools), ensure_ascii=False)), *turns


def offered_tools(prompt: Prompt) -> list[dict[str, Any]]:
    """The tools that the conversation offers, in the OpenAI shape."""
    if isinstance(prompt, str) or not prompt or prompt[0].role != TOOLS_ROLE:
        return []
    tools: list[dict[str, Any]] = json.loads(prompt[0].content)
    return tools


def spoken(prompt: Sequence[Message]) -> tuple[Message, ...]:
    """The turns of the conversation, without the tools that it offers."""
    return tuple(message for message in prompt if message.role != TOOLS_ROLE)


def messages_as_dicts(prompt: Sequence[Message]) -> list[dict[str, Any]]:
    """The turns in the OpenAI shape, without the tools that the conversation offers."""
    return [message.as_dict() for message in spoken(prompt)]
