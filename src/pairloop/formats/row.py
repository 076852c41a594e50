"""One row under validation: what it says, and every reason to refuse it, each with its JSON path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pairloop.errors import RowProblem
from pairloop.types import Label, Message, Prompt, Source

MISSING: Any = object()
"""Stands for a value that is not there (or was refused already); JSON's null is None."""

_ROLES = ("system", "developer", "user", "assistant")
_OPENING_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Mark:
    """What a row says about its completions: a pick (``label``), or a ``value`` of completion ``choice_index``."""

    metric: str
    label: Label | None = None
    choice_index: int | None = None
    value: float | bool | None = None
    rater_id: str | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """What a row says, as far as it can be read: None stands where a prompt or an answer was refused."""

    prompt: Prompt | None
    completions: tuple[str | None, ...]
    marks: tuple[Mark, ...]


@dataclass
class Row:
    """One JSON object of a file, with the problems found in it so far."""

    file: str
    line: int
    value: Mapping[str, Any]
    problems: list[RowProblem] = field(default_factory=list)

    def refuse(self, path: str, reason: str, message: str) -> None:
        self.problems.append(RowProblem(self.file, self.line, path, reason, message))

    def get(self, holder: Any, path: str, key: str) -> Any:
        """``holder[key]``; MISSING, with the reason, where ``holder`` is no object or lacks the key."""
        if holder is MISSING:
            return MISSING
        if not isinstance(holder, Mapping):
            self.refuse(path, "not_an_object", f"expected an object, found {kind_of(holder)}")
            return MISSING
        if key not in holder:
            self.refuse(path, "missing_key", f"the key {key!r} is missing")
            return MISSING
        return holder[key]

    def one_of(self, holder: Any, path: str, keys: tuple[str, ...]) -> tuple[str, Any]:
        """The one of several spellings of a key that is there, and its value."""
        present = [key for key in keys if isinstance(holder, Mapping) and key in holder]
        if len(present) > 1:
            self.refuse(path, "ambiguous_key", f"the keys {', '.join(present)} mean the same: give one of them")
            return keys[0], MISSING
        if not present and isinstance(holder, Mapping):
            self.refuse(path, "missing_key", f"one of the keys {', '.join(keys)} is needed")
            return keys[0], MISSING
        key = present[0] if present else keys[0]
        return key, self.get(holder, path, key)

    def source(self) -> Source:
        """The row's ``source`` (human, code or llm); a person where it does not say."""
        raw = self.value.get("source", Source.HUMAN.value)
        if raw in tuple(Source):
            return Source(raw)
        self.refuse("$.source", "unknown_source", f"source must be human, code or llm, found {raw!r}")
        return Source.HUMAN

    def rater(self, holder: Mapping[str, Any], path: str) -> str | None:
        """The ``rater_id`` of a row or label, where it has one."""
        raw = holder.get("rater_id")
        if raw is None or (isinstance(raw, str) and raw.strip()):
            return raw
        self.refuse(f"{path}.rater_id", "bad_rater", f"rater_id must be a non-empty string, found {raw!r}")
        return None

    def string(self, path: str, value: Any) -> str | None:
        """A string that UTF-8 can hold, or None with the reason."""
        if value is MISSING:
            return None
        if not isinstance(value, str):
            self.refuse(path, "not_a_string", f"expected a string, found {kind_of(value)}")
            return None
        try:
            value.encode()
        except UnicodeEncodeError:
            self.refuse(path, "not_unicode", "half a surrogate pair: not a Unicode text")
            return None
        return value

    def answers(self, found: list[tuple[str, Any]], *, distinct: bool = False) -> tuple[str | None, ...]:
        """The completions at these paths: strings first, then not blank, then (``distinct``) different from each other."""
        texts = [self.string(path, value) for path, value in found]
        for index, (path, _) in enumerate(found):
            text = texts[index]
            if text is not None and not text.strip():
                self.refuse(path, "empty_answer", "the answer is empty")
                texts[index] = None
        if distinct and None not in texts and len(set(texts)) < len(texts):
            self.refuse(found[-1][0], "identical_answers", "the two answers are identical: there is nothing to prefer")
        return tuple(texts)

    def answer_message(self, path: str, value: Any) -> tuple[str, Any]:
        """Path and content of a completion written as a list of exactly one assistant message."""
        if value is MISSING:
            return path, MISSING
        if not isinstance(value, list):
            self.refuse(path, "not_a_list", f"expected a list with one assistant message, found {kind_of(value)}")
            return path, MISSING
        if len(value) != 1:
            self.refuse(path, "answer_turns", f"expected exactly one assistant message, found {len(value)} messages")
            return path, MISSING
        return self.assistant_turn(f"{path}[0]", value[0])

    def assistant_turn(self, path: str, turn: Any) -> tuple[str, Any]:
        """Path and content of one assistant message."""
        role, content = self.get(turn, path, "role"), MISSING
        if role is not MISSING:
            content = self.get(turn, path, "content")
            if role != "assistant":
                self.refuse(f"{path}.role", "wrong_role", f"an answer's role must be assistant, found {role!r}")
                content = MISSING
            elif turn.get("tool_calls"):
                self.refuse(f"{path}.tool_calls", "tool_turn", "tool calls are not supported")
                content = MISSING
        return f"{path}.content", content

    def conversation(self, path: str, value: Any) -> tuple[Message, ...] | None:
        """A prompt: an optional opening system message, then turns that alternate and end with the user's.

        An assistant may speak first (a greeting).
        """
        turns = self.turns(path, value)
        if turns is None:
            return None
        before = len(self.problems)
        for index, turn in enumerate(turns):
            self._check_order(f"{path}[{index}].role", turns, index, turn.role)
        if turns[-1].role != "user":
            last = f"{path}[{len(turns) - 1}].role"
            self.refuse(last, "turn_order", f"a prompt must end with the user, not {turns[-1].role}")
        return turns if len(self.problems) == before else None

    def turns(self, path: str, value: Any) -> tuple[Message, ...] | None:
        """A non-empty list of messages, each with a known role and a string as content."""
        if value is MISSING:
            return None
        if not isinstance(value, list) or not value:
            found = "an empty list" if isinstance(value, list) else kind_of(value)
            self.refuse(path, "not_a_list", f"expected a list of messages, found {found}")
            return None
        messages = [self._message(f"{path}[{index}]", turn) for index, turn in enumerate(value)]
        complete = tuple(message for message in messages if message is not None)
        return complete if len(complete) == len(messages) else None

    def prompt(self, path: str, value: Any) -> Prompt | None:
        """A conversation, or a plain string that is used as it is."""
        if not isinstance(value, str):
            return self.conversation(path, value)
        if not value.strip():
            self.refuse(path, "empty_prompt", "the prompt is empty")
            return None
        return self.string(path, value)

    def _message(self, path: str, turn: Any) -> Message | None:
        role = self.get(turn, path, "role")
        if role is MISSING:
            return None
        if role in ("tool", "function") or turn.get("tool_calls"):
            self.refuse(path, "tool_turn", "tool turns and tool calls are not supported")
            return None
        if role not in _ROLES:
            self.refuse(f"{path}.role", "wrong_role", f"unknown role {role!r}; known are {', '.join(_ROLES)}")
            return None
        content = self.string(f"{path}.content", self.get(turn, path, "content"))
        if content is not None and not content.strip() and role not in _OPENING_ROLES:
            self.refuse(f"{path}.content", "empty_turn", f"the {role} turn is empty")
            return None
        return None if content is None else Message(role, content)

    def _check_order(self, path: str, turns: tuple[Message, ...], index: int, role: str) -> None:
        if index and role in _OPENING_ROLES:
            self.refuse(path, "turn_order", f"a {role} message must come first")
        elif index and role == turns[index - 1].role:
            self.refuse(path, "turn_order", f"two {role} turns in a row")


def kind_of(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
