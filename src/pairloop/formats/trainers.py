"""Other trainers that take our rows as they are: which family each reads, on which conditions, how it is told about the file.

TRL and the OpenAI API need no entry here: the families ``trl`` and ``openai`` are what they read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairloop.formats import ranking
from pairloop.formats.family import CannotHold
from pairloop.formats.row import Draft


@dataclass(frozen=True, slots=True)
class Trainer:
    """``write`` declines what the trainer would misread; ``describe`` writes what it needs beside the rows, if anything."""

    write: Callable[[Draft], dict[str, Any]]
    describe: Callable[[Path], Path | None] = lambda _: None


def _llama_factory(draft: Draft) -> dict[str, Any]:
    """Family ``ranking``, from the user's first turn on.

    LLaMA-Factory drops a row whose turns do not alternate from the user's on, with one warning in its log
    (src/llamafactory/data/converter.py), and does not know the role developer.
    """
    row = _without_tools(draft)
    roles = [turn["role"] for turn in row["messages"] if turn["role"] != "system"]
    if roles[0] == "assistant":
        raise CannotHold("greeting")
    return row


def _without_tools(draft: Draft) -> dict[str, Any]:
    """Family ``ranking`` without tools, which both trainers leave out of the prompt of such a row."""
    row = ranking.write(draft)
    if "tools" in row or any(turn["role"] == "tool" for turn in row["messages"]):
        raise CannotHold("tools")
    if any(turn["role"] == "developer" for turn in row["messages"]):
        raise CannotHold("developer_role")
    return row


def _dataset_info(rows: Path) -> Path:
    """LLaMA-Factory's dataset_info.json beside the rows, with their entry; other entries of that file stay."""
    path = rows.with_name("dataset_info.json")
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entries[rows.stem] = {
        "file_name": rows.name,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


TRAINERS: dict[str, Trainer] = {
    "llama-factory": Trainer(_llama_factory, _dataset_info),
    "axolotl": Trainer(_without_tools),
}
