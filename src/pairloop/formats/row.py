"""One row under validation: what it says, and every reason to refuse it, each with its JSON path."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pairloop.errors import RowProblem
from pairloop.types import Label, Prompt, Source

MISSING: Any = object()
"""Stands for a value that is not there (or was refused already); JSON's null is None."""

Found = tuple[str, Any]
"""A JSON path and the value that stands there, or MISSING."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a row says about its completions: a pick (``label``), or a ``value`` of completion ``choice_index``.

    ``text`` is what was said beside it; no family but the imports holds one.
    """

    metric: str
    label: Label | None = None
    choice_index: int | None = None
    value: float | bool | str | None = None
    rater_id: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """What a row says, whatever its family; while it is read, None stands where a prompt or an answer was refused."""

    prompt: Prompt | None
    completions: tuple[str | None, ...]
    marks: tuple[Mark, ...]
    source: Source = Source.HUMAN
    parallel_tool_calls: bool = True


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
        if raw is None:
            return None
        if isinstance(raw, str) and raw.strip():
            return self.string(f"{path}.rater_id", raw)
        self.refuse(f"{path}.rater_id", "bad_rater", f"rater_id must be a non-empty string, found {raw!r}")
        return None

    def flag(self, holder: Any, path: str, key: str, *, default: bool) -> bool:
        """A switch that may be left out."""
        raw = holder.get(key) if isinstance(holder, Mapping) else None
        if raw is None or isinstance(raw, bool):
            return default if raw is None else raw
        self.refuse(f"{path}.{key}", "not_a_boolean", f"{key} must be true or false, found {kind_of(raw)}")
        return default

    def string(self, path: str, value: Any) -> str | None:
        """A string that UTF-8 can hold, or None with the reason."""
        if value is MISSING:
            return None
        if not isinstance(value, str):
            self.refuse(path, "not_a_string", f"expected a string, found {kind_of(value)}")
            return None
        if is_text(value):
            return value
        self.refuse(path, "not_unicode", "half a surrogate pair: not a Unicode text")
        return None

    def answers(self, found: list[Found], *, distinct: bool = False) -> tuple[str | None, ...]:
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

    def answer(self, path: str, value: Any) -> Found:
        """Path and content of a completion: a string, an assistant message, or a list of exactly one such message."""
        if value is MISSING or isinstance(value, str):
            return path, value
        return self.assistant_turn(path, value) if isinstance(value, Mapping) else self.answer_message(path, value)

    def answer_message(self, path: str, value: Any) -> Found:
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

    def assistant_turn(self, path: str, turn: Any) -> Found:
        """Path and content of one assistant message."""
        role, content = self.get(turn, path, "role"), MISSING
        if role is not MISSING:
            content = self.get(turn, path, "content")
            if role != "assistant":
                self.refuse(f"{path}.role", "wrong_role", f"an answer's role must be assistant, found {role!r}")
                content = MISSING
            elif turn.get("tool_calls"):
                self.refuse(
                    f"{path}.tool_calls", "tool_answer", "an answer must be text: one that calls tools cannot be trained on"
                )
                content = MISSING
        return f"{path}.content", content

    def score(self, holder: Any, path: str, keys: tuple[str, ...]) -> float | None:
        """The finite number under the one of ``keys`` that is there; true is 1 and false is 0."""
        key, value = self.one_of(holder, path, keys)
        if value is MISSING:
            return None
        if isinstance(value, int | float) and abs(value) <= _LARGEST:
            return float(value)
        self.refuse(f"{path}.{key}", "not_a_number", f"a score must be a finite number, found {kind_of(value)}")
        return None


_LARGEST = sys.float_info.max


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold the string: half a surrogate pair it cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
