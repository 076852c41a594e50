"""One row of each family that is read: the same question, a good answer and a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pairloop.formats import ReadResult, read_rows

USER: list[Any] = [{"role": "user", "content": "Where is my order?"}]
GOOD, BAD = "It arrives on Monday.", "No idea."
MESSAGES = {"role": "assistant", "content": GOOD}, {"role": "assistant", "content": BAD}

ROWS: dict[str, dict[str, Any]] = {
    "openai": {"input": {"messages": USER}, "preferred_output": [MESSAGES[0]], "non_preferred_output": [MESSAGES[1]]},
    "conversations": {"chosen": {"messages": [*USER, MESSAGES[0]]}, "rejected": {"messages": [*USER, MESSAGES[1]]}},
    "trl": {"prompt": USER, "chosen": [MESSAGES[0]], "rejected": [MESSAGES[1]]},
    "thumbs": {"prompt": USER, "completion": [MESSAGES[0]], "label": True},
    "responses": {"messages": USER, "preferred_response": GOOD, "dispreferred_response": BAD},
    "comparisons": {
        "comparison": {"prompt_conversation": USER, "completion_A": [MESSAGES[0]], "completion_B": [MESSAGES[1]]},
        "label": "A",
    },
    "scored": {"messages": USER, "responses": [{"content": GOOD, "score": 0.8}, {"content": BAD, "score": 0.1}]},
}
ROWS |= {
    "samples": {
        "samples": [{"messages": [*USER, MESSAGES[0]], "score": 1.0}, {"messages": [*USER, MESSAGES[1]], "score": 0.0}],
    },
    "candidates": {
        "messages": [
            *USER,
            {
                "role": "assistant",
                "candidates": [
                    {"content": GOOD, "preferenceLabel": "preferred"},
                    {"content": [{"text": BAD}], "preferenceLabel": "non-preferred"},
                ],
            },
        ]
    },
    "rejected_message": {"messages": [*USER, MESSAGES[0]], "rejected_message": MESSAGES[1]},
    "picks": {"messages": USER, "preferred_completion": GOOD, "other_completion": MESSAGES[1], "tied": None},
    "ranking": {"messages": USER, "chosen": MESSAGES[0], "rejected": MESSAGES[1]},
    "sft": {"messages": [*USER, MESSAGES[0]]},
}
ALONE = ("thumbs", "sft")
"""Families of one answer."""


def read(path: Path, *rows: object, **options: Any) -> ReadResult:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return read_rows(path, **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"
