"""What every family of dataset rows has: a name, the keys that give it away, a parser, and a writer that may decline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pairloop.formats.row import Draft, Mark, Row
from pairloop.types import PREFERENCE_METRIC, SCORE_METRIC, Label, Prompt, messages_as_dicts, offered_tools


class CannotHold(Exception):
    """A family has no place for what a row says; ``reason`` is a stable code such as ``tie`` or ``plain_prompt``.

    An answer, not a failure: the writer counts it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Family:
    """``matches`` looks at keys alone; ``parse`` records every problem in the row and returns what could be read.

    ``write`` is its inverse: CannotHold where the family has no place for what is said, None where we only read it.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Row], Draft]
    write: Callable[[Draft], dict[str, Any]] | None = None


def first_is_better(row: Row) -> tuple[Mark, ...]:
    """The mark of a row that names its chosen answer: completions are (chosen, rejected), so A was picked."""
    return (Mark(PREFERENCE_METRIC, label=Label.A, rater_id=row.rater(row.value, "$")),)


def decided(draft: Draft) -> tuple[str, str]:
    """(chosen, rejected) of one rater's decided pick between two answers; CannotHold for anything else."""
    label = picked(draft)
    if label not in (Label.A, Label.B):
        raise CannotHold(label.value.lower())
    first, second = texts(draft)
    return (first, second) if label is Label.A else (second, first)


def picked(draft: Draft) -> Label:
    """The label of one rater's pick between two answers; CannotHold for anything else."""
    [mark, *more] = marks_of(draft, PREFERENCE_METRIC)
    if more:
        raise CannotHold("several_raters")
    assert mark.label is not None, "a pick has a label"
    return mark.label


def scores_of(draft: Draft) -> list[float]:
    """One score per answer. A decided pick is a group of two with rewards (1, 0); CannotHold for anything else."""
    if draft.marks and draft.marks[0].metric == PREFERENCE_METRIC:
        chosen, _ = decided(draft)
        return [float(text == chosen) for text in texts(draft)]
    marks = {mark.choice_index: mark.value for mark in marks_of(draft, SCORE_METRIC)}
    if len(marks) < len(draft.marks):
        raise CannotHold("several_raters")
    if len(marks) < len(draft.completions):
        raise CannotHold("unscored_answer")
    return [float(marks[index] or 0) for index in range(len(draft.completions))]


def marks_of(draft: Draft, metric: str) -> tuple[Mark, ...]:
    """All marks, which must be of one metric; CannotHold with the metric's name (or ``unlabelled``) otherwise."""
    if not draft.marks:
        raise CannotHold("unlabelled")
    other = next((mark.metric for mark in draft.marks if mark.metric != metric), None)
    if other is not None:
        raise CannotHold(other)
    return draft.marks


def texts(draft: Draft) -> tuple[str, ...]:
    return tuple(text for text in draft.completions if text is not None)


def messages(draft: Draft) -> list[dict[str, Any]]:
    """The prompt's turns; CannotHold for a plain string, which a conversation would hand to the chat template."""
    return messages_as_dicts(_turns(draft.prompt))


def tool_keys(draft: Draft, *, always: bool = False) -> dict[str, Any]:
    """The keys ``tools`` and ``parallel_tool_calls``, where there is something to say (or ``always``)."""
    tools = offered_tools(draft.prompt or "")
    keys: dict[str, Any] = {"tools": tools} if tools or always else {}
    return {**keys, "parallel_tool_calls": draft.parallel_tool_calls} if always or not draft.parallel_tool_calls else keys


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _turns(prompt: Prompt | None) -> Any:
    if isinstance(prompt, str) or prompt is None:
        raise CannotHold("plain_prompt")
    return prompt
