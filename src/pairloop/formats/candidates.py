"""Family G: candidates in the last turn, as Amazon Bedrock trains on them.

``{"messages":[…,{"role":"assistant","candidates":[{"content":…,"preferenceLabel":"preferred"},{…:"non-preferred"}]}]}``.
A candidate's content is a string, or a list with one ``{"text": …}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family, decided, messages, tool_keys
from pairloop.formats.row import MISSING, Draft, Found, Mark, Row, kind_of
from pairloop.types import PREFERENCE_METRIC, Label

_LABELS = {"preferred": Label.A, "non-preferred": Label.B}


def matches(row: Mapping[str, Any]) -> bool:
    given = row.get("messages")
    return isinstance(given, list) and bool(given) and isinstance(given[-1], Mapping) and "candidates" in given[-1]


def parse(row: Row) -> Draft:
    given = row.get(row.value, "$", "messages")
    if not isinstance(given, list) or len(given) < 2:
        row.refuse("$.messages", "not_a_list", "expected a list of at least two messages: a prompt and a turn of candidates")
        return Draft(None, (), ())
    prompt = turns.conversation(row, "$.messages", given[:-1], turns.offered(row, row.value, "$"))
    path = f"$.messages[{len(given) - 1}]"
    if row.get(given[-1], path, "role") not in ("assistant", MISSING):
        row.refuse(f"{path}.role", "wrong_role", f"candidates are the assistant's, not {given[-1]['role']!r}")
    candidates, path = row.get(given[-1], path, "candidates"), f"{path}.candidates"
    if not isinstance(candidates, list) or len(candidates) != 2:
        row.refuse(path, "not_a_list", "expected a list of two candidates: one preferred, one non-preferred")
        return Draft(prompt, (), ())
    found = [_text(row, f"{path}[{index}]", candidate) for index, candidate in enumerate(candidates)]
    return Draft(prompt, row.answers(found, distinct=True), _marks(row, path, candidates))


def _text(row: Row, path: str, candidate: Any) -> Found:
    content, path = row.get(candidate, path, "content"), f"{path}.content"
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping):
        return f"{path}[0].text", row.get(content[0], f"{path}[0]", "text")
    return path, content


def _marks(row: Row, path: str, candidates: list[Any]) -> tuple[Mark, ...]:
    labels = []
    for index, candidate in enumerate(candidates):
        raw = row.get(candidate, f"{path}[{index}]", "preferenceLabel") if isinstance(candidate, Mapping) else MISSING
        label = _LABELS.get(raw) if isinstance(raw, str) else None
        if label is None and raw is not MISSING:
            found = repr(raw) if isinstance(raw, str) else kind_of(raw)
            row.refuse(f"{path}[{index}].preferenceLabel", "bad_label", f"expected preferred or non-preferred, found {found}")
        labels.append(label)
    if None not in labels and labels[0] is labels[1]:
        row.refuse(path, "bad_label", "one candidate must be preferred and the other non-preferred")
    rater = row.rater(row.value, "$")
    # The first candidate is answer A: preferred, A was picked; non-preferred, B.
    return () if labels[0] is None else (Mark(PREFERENCE_METRIC, label=labels[0], rater_id=rater),)


def write(draft: Draft) -> dict[str, Any]:
    chosen, rejected = decided(draft)
    candidates = [
        {"content": chosen, "preferenceLabel": "preferred"},
        {"content": rejected, "preferenceLabel": "non-preferred"},
    ]
    return {"messages": [*messages(draft), {"role": "assistant", "candidates": candidates}], **tool_keys(draft)}


FAMILY = Family("candidates", matches, parse, write)
