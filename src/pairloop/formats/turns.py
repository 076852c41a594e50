"""Conversations under validation: roles, the order of turns, and the tools that are offered, called and answered.

A conversation is an optional opening system (or developer) message and then turns of user and assistant that alternate; an
assistant may speak first (a greeting). An assistant turn may call tools. Then turns of role ``tool`` follow that answer every
one of its calls, each once, by ``tool_call_id``, and the assistant goes on. A prompt ends with the user or with the last answer
of a tool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pairloop.formats.row import MISSING, Found, Row, is_text, kind_of
from pairloop.types import Message, Prompt, ToolCall, with_tools

_OPENING_ROLES = ("system", "developer")
_ROLES = (*_OPENING_ROLES, "user", "assistant", "tool")
_MAY_BE_EMPTY = (*_OPENING_ROLES, "tool")


def conversation(row: Row, path: str, value: Any, tools: list[dict[str, Any]] | None = None) -> tuple[Message, ...] | None:
    """A prompt that offers ``tools``, or None with every reason."""
    turns = _turns(row, path, value)
    if turns is None:
        return None
    before = len(row.problems)
    calls = _Calls(row)
    for index, turn in enumerate(turns):
        calls.check(f"{path}[{index}]", turn)
        _check_order(row, f"{path}[{index}].role", turns, index)
    calls.close(f"{path}[{len(turns) - 1}]")
    if turns[-1].role not in ("user", "tool"):
        last = f"{path}[{len(turns) - 1}].role"
        row.refuse(last, "turn_order", f"a prompt must end with the user (or a tool's answer), not {turns[-1].role}")
    return with_tools(tools or (), turns) if len(row.problems) == before else None


def split(
    row: Row, path: str, value: Any, tools: list[dict[str, Any]] | None = None
) -> tuple[tuple[Message, ...] | None, Found]:
    """Of a whole conversation: all turns but the last as the prompt; path and content of the last, the assistant's."""
    if value is MISSING:
        return None, (path, MISSING)
    if not isinstance(value, list) or len(value) < 2:
        row.refuse(path, "not_a_list", "expected a list of at least two messages: a prompt and the assistant's answer")
        return None, (path, MISSING)
    return conversation(row, path, value[:-1], tools), row.assistant_turn(f"{path}[{len(value) - 1}]", value[-1])


def prompt(row: Row, path: str, value: Any, tools: list[dict[str, Any]] | None = None) -> Prompt | None:
    """A conversation, or a plain string that is used as it is."""
    if not isinstance(value, str):
        return conversation(row, path, value, tools)
    if tools:
        row.refuse(path, "mixed_forms", "a prompt that is a plain string cannot offer tools: write it as messages")
        return None
    if not value.strip():
        row.refuse(path, "empty_prompt", "the prompt is empty")
        return None
    return row.string(path, value)


def offered(row: Row, holder: Any, path: str) -> list[dict[str, Any]]:
    """The ``tools`` of a row: a list of functions in the OpenAI shape, or that list as JSON text (as TRL writes it)."""
    value = holder.get("tools") if isinstance(holder, Mapping) else None
    path = f"{path}.tools"
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            row.refuse(path, "bad_tool", "tools is a string, but not JSON")
            return []
    if value is None:
        return []
    if not isinstance(value, list):
        row.refuse(path, "bad_tool", f"tools must be a list of functions, found {kind_of(value)}")
        return []
    return [tool for index, tool in enumerate(value) if _is_tool(row, f"{path}[{index}]", tool)]


def _is_tool(row: Row, path: str, tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if isinstance(tool, Mapping) and tool.get("type") == "function" and isinstance(name, str) and name.strip():
        if is_text(json.dumps(tool, ensure_ascii=False)):
            return True
        row.refuse(path, "not_unicode", "half a surrogate pair: not a Unicode text")
    else:
        row.refuse(path, "bad_tool", 'a tool is {"type": "function", "function": {"name": …, "parameters": …}}')
    return False


def _turns(row: Row, path: str, value: Any) -> tuple[Message, ...] | None:
    """A non-empty list of messages, each with a known role and a string as content."""
    if value is MISSING:
        return None
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else kind_of(value)
        row.refuse(path, "not_a_list", f"expected a list of messages, found {found}")
        return None
    messages = [_message(row, f"{path}[{index}]", turn) for index, turn in enumerate(value)]
    complete = tuple(message for message in messages if message is not None)
    return complete if len(complete) == len(messages) else None


def _message(row: Row, path: str, turn: Any) -> Message | None:
    role = row.get(turn, path, "role")
    if role is MISSING:
        return None
    if role not in _ROLES:
        hint = " (a tool's answer has the role tool and a tool_call_id)" if role == "function" else ""
        row.refuse(f"{path}.role", "wrong_role", f"unknown role {role!r}; known are {', '.join(_ROLES)}{hint}")
        return None
    raw_calls = turn.get("tool_calls")
    calls = _tool_calls(row, f"{path}.tool_calls", role, raw_calls) if raw_calls else ()
    if calls is None:
        return None
    content = _content(row, path, turn, role, calls)
    answers = row.string(f"{path}.tool_call_id", row.get(turn, path, "tool_call_id")) if role == "tool" else None
    if content is None or (role == "tool" and answers is None):
        return None
    return Message(role, content, calls, answers)


def _content(row: Row, path: str, turn: Mapping[str, Any], role: str, calls: tuple[ToolCall, ...]) -> str | None:
    """The turn's text; that of a turn which calls tools may be null, missing or empty."""
    if calls and turn.get("content") is None:
        return ""
    content = row.string(f"{path}.content", row.get(turn, path, "content"))
    if content is not None and not content.strip() and role not in _MAY_BE_EMPTY and not calls:
        row.refuse(f"{path}.content", "empty_turn", f"the {role} turn is empty")
        return None
    return content


def _tool_calls(row: Row, path: str, role: str, value: Any) -> tuple[ToolCall, ...] | None:
    if role != "assistant":
        row.refuse(path, "bad_tool_call", f"only an assistant turn calls tools, not one of role {role}")
        return None
    if not isinstance(value, list):
        row.refuse(path, "bad_tool_call", f"tool_calls must be a list, found {kind_of(value)}")
        return None
    calls = [_tool_call(row, f"{path}[{index}]", call) for index, call in enumerate(value)]
    complete = tuple(call for call in calls if call is not None)
    return complete if len(complete) == len(calls) else None


def _tool_call(row: Row, path: str, call: Any) -> ToolCall | None:
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, Mapping):
        call_id, name, arguments = call.get("id"), function.get("name"), function.get("arguments")
        if isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, str) and call_id and name:
            if all(is_text(part) for part in (call_id, name, arguments)):
                return ToolCall(call_id, name, arguments)
            row.refuse(path, "not_unicode", "half a surrogate pair: not a Unicode text")
            return None
    shape = '{"id": "…", "type": "function", "function": {"name": "…", "arguments": "…"}}'
    row.refuse(path, "bad_tool_call", f"a tool call is {shape}, all strings")
    return None


@dataclass
class _Calls:
    """The calls of a conversation: which ones are known, and which ones wait for their answer."""

    row: Row
    known: set[str] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)

    def check(self, path: str, turn: Message) -> None:
        if turn.role == "tool":
            self._answer(f"{path}.tool_call_id", turn.tool_call_id or "")
            return
        self.close(path)
        for index, call in enumerate(turn.tool_calls):
            if call.id in self.known:
                self.row.refuse(f"{path}.tool_calls[{index}].id", "bad_tool_call", f"the id {call.id!r} was used before")
            self.known.add(call.id)
            self.waiting.append(call.id)

    def close(self, path: str) -> None:
        """At the next turn that is no tool's, and at the end, nothing may wait any more."""
        for call_id in self.waiting:
            self.row.refuse(path, "missing_tool_answer", f"the tool call {call_id!r} has no answer")
        self.waiting.clear()

    def _answer(self, path: str, call_id: str) -> None:
        if call_id in self.waiting:
            self.waiting.remove(call_id)
        elif call_id in self.known:
            self.row.refuse(path, "duplicate_tool_answer", f"the tool call {call_id!r} waits for no answer here")
        else:
            self.row.refuse(path, "unknown_tool_call", f"no earlier turn made a tool call {call_id!r}")


def _check_order(row: Row, path: str, turns: tuple[Message, ...], index: int) -> None:
    role = turns[index].role
    if index and role in _OPENING_ROLES:
        row.refuse(path, "turn_order", f"a {role} message must come first")
    elif index and role != "tool" and role == turns[index - 1].role:
        row.refuse(path, "turn_order", f"two {role} turns in a row")
