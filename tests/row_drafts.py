"""Hypothesis strategies for what rows say, and when two rows say the same."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from pairloop.formats.row import Draft, Mark
from pairloop.types import (
    DEMONSTRATION_METRIC,
    PREFERENCE_METRIC,
    SCORE_METRIC,
    THUMBS_METRIC,
    Label,
    Message,
    Source,
    ToolCall,
    with_tools,
)

texts = st.text(min_size=1, max_size=40).filter(str.strip)
raters = st.none() | texts
sources = st.sampled_from(Source)
tools = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts}, optional={"parameters": st.just({})})}
    ),
    max_size=2,
)


@st.composite
def exchanges(draw: st.DrawFn, *, said: str) -> list[Message]:
    """An assistant turn, sometimes one that calls tools first, with their answers in any order."""
    turns = []
    if draw(st.booleans()):
        count = draw(st.integers(1, 2))
        calls = tuple(ToolCall(f"call-{said}-{n}", draw(texts), draw(st.text(max_size=9))) for n in range(count))
        turns.append(Message("assistant", draw(st.text(max_size=9)), calls))
        turns += [Message("tool", draw(st.text(max_size=9)), tool_call_id=call.id) for call in draw(st.permutations(calls))]
    return [*turns, Message("assistant", draw(texts))]


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """Whatever a prompt may be: opened by a system turn or a greeting or not, with tools or not, ended by user or tool."""
    turns: list[Message] = []
    if draw(st.booleans()):
        turns.append(Message(draw(st.sampled_from(("system", "developer"))), draw(st.text(max_size=20))))
    if draw(st.booleans()):
        turns.append(Message("assistant", draw(texts)))
    for number in range(draw(st.integers(0, 2))):
        turns += [Message("user", draw(texts)), *draw(exchanges(said=str(number)))]
    turns.append(Message("user", draw(texts)))
    if draw(st.booleans()):
        call = ToolCall("call-last", draw(texts), "{}")
        turns += [Message("assistant", "", (call,)), Message("tool", draw(st.text(max_size=9)), tool_call_id=call.id)]
    return with_tools(draw(tools), turns)


prompts = conversations() | texts
all_labels = st.sampled_from(Label)


@st.composite
def comparisons(draw: st.DrawFn, labels: st.SearchStrategy[Label] = all_labels) -> Draft:
    two = draw(st.lists(texts, min_size=2, max_size=2, unique=True))
    mark = Mark(PREFERENCE_METRIC, label=draw(labels), rater_id=draw(raters))
    return Draft(draw(prompts), tuple(two), (mark,), draw(sources), draw(st.booleans()))


@st.composite
def panels(draw: st.DrawFn) -> Draft:
    """One comparison with the picks of several raters."""
    names = draw(st.lists(texts, min_size=2, max_size=3, unique=True))
    marks = tuple(Mark(PREFERENCE_METRIC, label=draw(st.sampled_from(Label)), rater_id=name) for name in names)
    return replace(draw(comparisons()), marks=marks)


@st.composite
def scored(draw: st.DrawFn) -> Draft:
    answers = draw(st.lists(texts, min_size=1, max_size=4))
    rater, numbers = draw(raters), st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from((0.0, 1.0))
    marks = tuple(Mark(SCORE_METRIC, choice_index=i, value=draw(numbers), rater_id=rater) for i in range(len(answers)))
    return Draft(draw(prompts), tuple(answers), marks, draw(sources), draw(st.booleans()))


@st.composite
def thumbs(draw: st.DrawFn) -> Draft:
    mark = Mark(THUMBS_METRIC, choice_index=0, value=draw(st.booleans()), rater_id=draw(raters))
    return Draft(draw(prompts), (draw(texts),), (mark,), draw(sources), draw(st.booleans()))


@st.composite
def demonstrations(draw: st.DrawFn) -> Draft:
    text = draw(texts)
    mark = Mark(DEMONSTRATION_METRIC, choice_index=0, value=text, rater_id=draw(raters))
    return Draft(draw(prompts), (text,), (mark,), draw(sources), draw(st.booleans()))


anything = comparisons() | panels() | scored() | thumbs() | demonstrations()


def meaning(draft: Draft, *, as_scores: bool = False) -> object:
    """What a row says: which answer of a decided pick stands first does not matter.

    ``as_scores``: in a family of scores a decided pick is a group of two with rewards (1, 0).
    """
    rest = (draft.prompt, draft.source, draft.parallel_tool_calls, {mark.rater_id for mark in draft.marks})
    labels = [mark.label for mark in draft.marks if mark.label is not None]
    if len(labels) == 1 and labels[0] in (Label.A, Label.B):
        a, b = draft.completions
        chosen, rejected = (a, b) if labels[0] is Label.A else (b, a)
        return (*rest, {chosen: 1.0, rejected: 0.0} if as_scores else (chosen, rejected))
    said = [(mark.metric, mark.label, mark.value, mark.rater_id) for mark in draft.marks]
    if as_scores and len(set(draft.completions)) == 2 == len(draft.completions):
        values = [mark.value for mark in draft.marks]
        if sorted(values, key=float) == [0.0, 1.0]:  # type: ignore[arg-type]
            return (*rest, dict(zip(draft.completions, values, strict=True)))
    return (*rest, draft.completions, said)
