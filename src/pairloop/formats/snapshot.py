"""Lossless preference pairs on disk: rows of the family ``openai`` with one more key, ``pairloop``, for all the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pairloop.errors import RowProblem, RowsError
from pairloop.formats.lines import read_values
from pairloop.types import Message, PairSide, PreferencePair, Prompt, Source, messages_as_dicts, offered_tools, with_tools

KEY = "pairloop"
TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
"""The two files of a snapshot folder."""


def write(path: Path, pairs: Iterable[PreferencePair]) -> int:
    """Write the pairs in their order and return how many; equal pairs give equal bytes."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            file.write(json.dumps(_row(pair), ensure_ascii=False) + "\n")
            count += 1
    return count


def read(path: Path) -> Iterator[PreferencePair]:
    """The pairs in their order, field for field what was written; RowsError at the first row that is no such pair.

    An empty file holds no pairs.
    """
    for item in read_values(path):
        if item.problem is not None and item.problem.reason == "empty_file":
            return
        if item.problem is not None:
            raise RowsError([item.problem])
        try:
            yield _pair(item.value)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            message = f"not a row of a pairloop snapshot: {type(error).__name__}: {error}"
            raise RowsError([RowProblem(str(path), item.line, "$", "not_a_snapshot", message)]) from error


def _row(pair: PreferencePair) -> dict[str, Any]:
    is_text = isinstance(pair.prompt, str)
    prompt = (Message("user", pair.prompt),) if isinstance(pair.prompt, str) else pair.prompt
    return {
        "input": {"messages": messages_as_dicts(prompt), "tools": offered_tools(prompt), "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": pair.chosen.text}],
        "non_preferred_output": [{"role": "assistant", "content": pair.rejected.text}],
        KEY: {
            "pair_id": pair.pair_id,
            "prompt_is_text": is_text,
            "source": pair.source.value,
            "prompt_token_ids": list(pair.prompt_token_ids),
            "chosen": _side(pair.chosen),
            "rejected": _side(pair.rejected),
            "sampled_by": pair.sampled_by,
            "tempered": pair.tempered,
            "weight": pair.weight,
            "group_ids": list(pair.group_ids),
            "feedback_ids": list(pair.feedback_ids),
        },
    }


def _side(side: PairSide) -> dict[str, list[Any]]:
    return {"token_ids": list(side.token_ids), "logps": list(side.logps)}


def _pair(row: dict[str, Any]) -> PreferencePair:
    extra = row[KEY]
    messages = row["input"]["messages"]
    prompt: Prompt = (
        messages[0]["content"]
        if extra["prompt_is_text"]
        else with_tools(row["input"]["tools"], [Message.from_dict(message) for message in messages])
    )
    return PreferencePair(
        pair_id=extra["pair_id"],
        prompt=prompt,
        chosen=_read_side(row["preferred_output"], extra["chosen"]),
        rejected=_read_side(row["non_preferred_output"], extra["rejected"]),
        source=Source(extra["source"]),
        prompt_token_ids=tuple(extra["prompt_token_ids"]),
        sampled_by=extra["sampled_by"],
        tempered=extra["tempered"],
        weight=extra["weight"],
        group_ids=tuple(extra["group_ids"]),
        feedback_ids=tuple(extra["feedback_ids"]),
    )


def _read_side(output: list[dict[str, Any]], recorded: dict[str, Any]) -> PairSide:
    return PairSide(output[0]["content"], tuple(recorded["token_ids"]), tuple(recorded["logps"]))
