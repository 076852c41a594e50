"""Lossless training rows on disk, each in a family's form with one more key, ``pairloop``, for all the rest.

A preference pair is a row of the family ``openai``, a scored group one of ``scored`` (messages and responses), a demonstration
a conversation that ends with the ideal answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from os import SEEK_END
from pathlib import Path
from typing import Any

from pairloop.errors import RowProblem, RowsError
from pairloop.formats.lines import read_values
from pairloop.types import (
    Message,
    PairSide,
    PreferencePair,
    Prompt,
    Source,
    TrainingGroup,
    TrainingRow,
    messages_as_dicts,
    offered_tools,
    with_tools,
)

KEY = "pairloop"
TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
"""The two files of a snapshot folder."""


def write(path: Path, rows: Iterable[TrainingRow]) -> int:
    """Write the rows in their order and return how many; equal rows give equal bytes."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            plain = _pair_row(row) if isinstance(row, PreferencePair) else _group_row(row)
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")
            count += 1
    return count


def write_folder(folder: Path, train: Iterable[TrainingRow], heldout: Iterable[TrainingRow] = ()) -> None:
    """Write a snapshot's two files into ``folder``, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / TRAIN_FILE, train)
    write(folder / HELDOUT_FILE, heldout)


def read_rows(path: Path) -> Iterator[TrainingRow]:
    """The rows in their order, field for field what was written; RowsError at the first that is none of a snapshot.

    An empty file holds none.
    """
    for item in read_values(path):
        if item.problem is not None and item.problem.reason == "empty_file":
            return
        if item.problem is not None:
            raise RowsError([item.problem])
        try:
            yield _pair(item.value) if "input" in item.value else _group(item.value)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            message = f"not a row of a pairloop snapshot: {type(error).__name__}: {error}"
            raise RowsError([RowProblem(str(path), item.line, "$", "not_a_snapshot", message)]) from error


def read_page(path: Path, at: int, limit: int) -> tuple[list[TrainingRow], int | None]:
    """``limit`` rows from the byte ``at`` on, and the byte where the next one begins, None at the end.

    Reads what it gives back and no more. ValueError where no row begins at ``at``, RowsError for what is no row of a snapshot.
    """
    rows: list[TrainingRow] = []
    with path.open("rb") as file:
        size = file.seek(0, SEEK_END)
        if at:
            file.seek(max(0, at - 1))
            if at >= size or file.read(1) != b"\n":
                raise ValueError(f"no row begins at byte {at} of {path.name}")
        file.seek(at)
        while len(rows) < limit and (line := file.readline()):
            rows.append(_row(line, path, len(rows) + 1))
        end = file.tell()
    return rows, None if end >= size else end


def _row(line: bytes, path: Path, number: int) -> TrainingRow:
    try:
        value = json.loads(line)
        return _pair(value) if "input" in value else _group(value)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        message = f"not a row of a pairloop snapshot: {type(error).__name__}: {error}"
        raise RowsError([RowProblem(str(path), number, "$", "not_a_snapshot", message)]) from error


def read(path: Path) -> Iterator[PreferencePair]:
    """The pairs of a snapshot that holds nothing else; RowsError at the first row of another kind."""
    for number, row in enumerate(read_rows(path), start=1):
        if not isinstance(row, PreferencePair):
            kind = "demonstration" if row.is_demonstration else "scored group"
            message = f"a {kind} stands where a preference pair is needed"
            raise RowsError([RowProblem(str(path), number, "$", "not_a_pair", message)])
        yield row


def _pair_row(pair: PreferencePair) -> dict[str, Any]:
    return {
        "input": {"messages": _messages(pair.prompt), "tools": offered_tools(pair.prompt), "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": pair.chosen.text}],
        "non_preferred_output": [{"role": "assistant", "content": pair.rejected.text}],
        KEY: {
            "pair_id": pair.pair_id,
            "prompt_is_text": isinstance(pair.prompt, str),
            "source": pair.source.value,
            "prompt_token_ids": list(pair.prompt_token_ids),
            "chosen": _side(pair.chosen),
            "rejected": _side(pair.rejected),
            **_rest(pair),
        },
    }


def _group_row(group: TrainingGroup) -> dict[str, Any]:
    messages: list[dict[str, Any]] = _messages(group.prompt)
    if group.is_demonstration:
        shown: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": group.answers[0].text}]}
    else:
        scored = zip(group.answers, group.rewards, strict=True)
        shown = {"messages": messages, "responses": [{"content": side.text, "score": reward} for side, reward in scored]}
    tools = offered_tools(group.prompt)
    return {
        **shown,
        **({"tools": tools} if tools else {}),
        KEY: {
            "row_id": group.row_id,
            "prompt_is_text": isinstance(group.prompt, str),
            "source": group.source.value,
            "prompt_token_ids": list(group.prompt_token_ids),
            "answers": [_side(side) for side in group.answers],
            "rewards": list(group.rewards),
            **_rest(group),
        },
    }


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    return [*messages_as_dicts((Message("user", prompt),) if isinstance(prompt, str) else prompt)]


def _rest(row: TrainingRow) -> dict[str, Any]:
    return {
        "sampled_by": row.sampled_by,
        "tempered": row.tempered,
        "weight": row.weight,
        "group_ids": list(row.group_ids),
        "feedback_ids": list(row.feedback_ids),
    }


def _side(side: PairSide) -> dict[str, list[Any]]:
    return {"token_ids": list(side.token_ids), "logps": list(side.logps)}


def _pair(row: dict[str, Any]) -> PreferencePair:
    extra = row[KEY]
    return PreferencePair(
        pair_id=extra["pair_id"],
        chosen=_read_side(row["preferred_output"][0], extra["chosen"]),
        rejected=_read_side(row["non_preferred_output"][0], extra["rejected"]),
        **_common(row["input"]["messages"], row["input"]["tools"], extra),
    )


def _group(row: dict[str, Any]) -> TrainingGroup:
    extra, messages = row[KEY], row["messages"]
    if "responses" in row:
        answers = row["responses"]
    else:
        *messages, answer = messages
        answers = [answer]
    return TrainingGroup(
        row_id=extra["row_id"],
        answers=tuple(_read_side(answer, side) for answer, side in zip(answers, extra["answers"], strict=True)),
        rewards=tuple(extra["rewards"]),
        **_common(messages, row.get("tools", []), extra),
    )


def _common(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
    prompt: Prompt = (
        messages[0]["content"]
        if extra["prompt_is_text"]
        else with_tools(tools, [Message.from_dict(message) for message in messages])
    )
    return {
        "prompt": prompt,
        "source": Source(extra["source"]),
        "prompt_token_ids": tuple(extra["prompt_token_ids"]),
        "sampled_by": extra["sampled_by"],
        "tempered": extra["tempered"],
        "weight": extra["weight"],
        "group_ids": tuple(extra["group_ids"]),
        "feedback_ids": tuple(extra["feedback_ids"]),
    }


def _read_side(answer: dict[str, Any], recorded: dict[str, Any]) -> PairSide:
    return PairSide(answer["content"], tuple(recorded["token_ids"]), tuple(recorded["logps"]))
