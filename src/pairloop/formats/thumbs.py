"""Family D, thumbs: TRL's rows for KTO, ``{"prompt":…,"completion":…,"label":true}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats.family import Family
from pairloop.formats.row import MISSING, Draft, Mark, Row, kind_of
from pairloop.formats.trl import answer
from pairloop.types import THUMBS_METRIC


def matches(row: Mapping[str, Any]) -> bool:
    return "completion" in row


def parse(row: Row) -> Draft:
    prompt = row.get(row.value, "$", "prompt")
    texts = row.answers([answer(row, "completion", prompt)])
    label = row.get(row.value, "$", "label")
    marks: tuple[Mark, ...] = ()
    if isinstance(label, bool):
        marks = (Mark(THUMBS_METRIC, choice_index=0, value=label, rater_id=row.rater(row.value, "$")),)
    elif label is not MISSING:
        row.refuse("$.label", "bad_label", f"label must be true or false, found {kind_of(label)}")
    return Draft(row.prompt("$.prompt", prompt), texts, marks)


FAMILY = Family("thumbs", matches, parse)
