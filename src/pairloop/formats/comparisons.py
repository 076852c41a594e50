"""Family F: ``{"comparison":{"prompt_conversation":[…],"completion_A":[…],"completion_B":[…]},"label":"A|B|Tie"}``.

One comparison may carry the picks of several raters instead: ``"labels":["A","B","Tie"]``, or
``"labels":[{"rater_id":"ann","label":"A"},…]``. Raters without a name are told apart by their place in the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family, assistant, marks_of, messages, texts, tool_keys
from pairloop.formats.row import MISSING, Draft, Mark, Row
from pairloop.types import PREFERENCE_METRIC, Label

_LABELS = {"A": Label.A, "B": Label.B, "Tie": Label.TIE, **{label.value: label for label in Label}}
_WRITTEN = {label: label.value for label in Label} | {Label.TIE: "Tie"}


def matches(row: Mapping[str, Any]) -> bool:
    return "comparison" in row


def parse(row: Row) -> Draft:
    given, path = row.get(row.value, "$", "comparison"), "$.comparison"
    tools = turns.offered(row, row.value, "$")
    prompt = turns.conversation(row, f"{path}.prompt_conversation", row.get(given, path, "prompt_conversation"), tools)
    keys = ("completion_A", "completion_B") if isinstance(given, Mapping) else ()
    found = [row.answer_message(f"{path}.{key}", row.get(given, path, key)) for key in keys]
    return Draft(prompt, row.answers(found, distinct=True), _marks(row))


def _marks(row: Row) -> tuple[Mark, ...]:
    key, raw = row.one_of(row.value, "$", ("label", "labels"))
    if raw is MISSING:
        return ()
    if key == "label":
        label = _label(row, "$.label", raw)
        return () if label is None else (Mark(PREFERENCE_METRIC, label=label, rater_id=row.rater(row.value, "$")),)
    if not isinstance(raw, list) or not raw:
        row.refuse("$.labels", "not_a_list", "labels must be a list of at least one pick")
        return ()
    marks = [mark for index, entry in enumerate(raw) if (mark := _pick(row, index, entry)) is not None]
    if len({mark.rater_id for mark in marks}) < len(marks):
        row.refuse("$.labels", "duplicate_rater", "one rater picked twice on one comparison")
    return tuple(marks)


def _pick(row: Row, index: int, entry: Any) -> Mark | None:
    path, rater = f"$.labels[{index}]", None
    if isinstance(entry, Mapping):
        rater = row.rater(entry, path)
        entry, path = row.get(entry, path, "label"), f"{path}.label"
    label = None if entry is MISSING else _label(row, path, entry)
    return None if label is None else Mark(PREFERENCE_METRIC, label=label, rater_id=rater or f"rater-{index + 1}")


def _label(row: Row, path: str, raw: Any) -> Label | None:
    label = _LABELS.get(raw) if isinstance(raw, str) else None
    if label is None:
        row.refuse(path, "bad_label", f"a label is one of {', '.join(_LABELS)}; found {raw!r}")
    return label


def write(draft: Draft) -> dict[str, Any]:
    marks = marks_of(draft, PREFERENCE_METRIC)
    first, second = texts(draft)
    comparison = {
        "prompt_conversation": messages(draft),
        "completion_A": [assistant(first)],
        "completion_B": [assistant(second)],
    }
    labels = [_WRITTEN[mark.label] for mark in marks if mark.label is not None]
    if len(marks) == 1:
        return {"comparison": comparison, "label": labels[0], **tool_keys(draft)}
    picks = [{"rater_id": mark.rater_id, "label": label} for mark, label in zip(marks, labels, strict=True)]
    return {"comparison": comparison, "labels": picks, **tool_keys(draft)}


FAMILY = Family("comparisons", matches, parse, write)
