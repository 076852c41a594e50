"""What other tools export: Open WebUI's feedback and OpenAI's stored completions, in small files true to their schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pairloop.formats import ReadResult, read_rows
from pairloop.loop.pairs import PairRules, compile_pairs
from pairloop.types import RELABELLED_TAG, Label, Message, Source


def _message(message_id: str, parent: str | None, children: list[str], role: str, content: str, **more: Any) -> dict[str, Any]:
    return {
        "id": message_id,
        "parentId": parent,
        "childrenIds": children,
        "role": role,
        "content": content,
        "timestamp": 1_740_000_000,
        **more,
    }


def _chat_tree() -> dict[str, Any]:
    """Two answers to the second question, and a greeting exchange before."""
    first, second = {"models": ["bot-a", "bot-b"]}, {"model": "bot-a", "modelIdx": 0, "done": True}
    return {
        "u1": _message("u1", None, ["a1"], "user", "Hello", **first),
        "a1": _message("a1", "u1", ["u2"], "assistant", "Hello! How can I help?", **second),
        "u2": _message("u2", "a1", ["a2", "a3"], "user", "Where is my order?", **first),
        "a2": _message("a2", "u2", [], "assistant", "It arrives on Monday.", **second),
        "a3": _message("a3", "u2", [], "assistant", "No idea.", model="bot-b", modelIdx=1, done=True),
    }


def feedback_row(message_id: str, rating: object, siblings: list[str] | None, **changes: Any) -> dict[str, Any]:
    chat = {
        "id": "",
        "title": "An order",
        "models": ["bot-a", "bot-b"],
        "params": {"system": "Be brief."},
        "history": {"messages": _chat_tree(), "currentId": "a2"},
        "messages": [],
        "tags": [],
        "timestamp": 1_740_000_000_000,
        "files": [],
    }
    return {
        "id": f"f-{message_id}",
        "user_id": "user-7",
        "version": 0,
        "type": "rating",
        "data": {
            "rating": rating,
            "model_id": "bot-a",
            "sibling_model_ids": siblings,
            "reason": "accurate_information",
            "comment": "on the point",
            "tags": [],
            "details": {"rating": 9},
        },
        "meta": {
            "arena": siblings is not None,
            "model_id": "bot-a",
            "message_id": message_id,
            "message_index": 4,
            "chat_id": "c1",
        },
        "snapshot": {"chat": {"id": "c1", "user_id": "user-7", "title": "An order", "chat": chat, "updated_at": 1_740_000_000}},
        "created_at": 1_740_000_000,
        "updated_at": 1_740_000_000,
        **changes,
    }


def _read(path: Path, *rows: dict[str, Any]) -> ReadResult:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return read_rows(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "feedback-history-export.json"


ASKED = (
    Message("system", "Be brief."),
    Message("user", "Hello"),
    Message("assistant", "Hello! How can I help?"),
    Message("user", "Where is my order?"),
)


def test_a_rating_alone_is_a_thumb_with_its_rater_and_comment(file: Path) -> None:
    result = _read(file, feedback_row("a2", 1, None), feedback_row("a3", "-1", []))
    assert (result.family, result.problems) == ("open_webui", [])
    up, down = result.groups
    assert (up.group.prompt, up.group.completions[0].text) == (ASKED, "It arrives on Monday.")
    [row] = up.feedback
    assert (row.metric, row.value, row.choice_index, row.rater_id, row.text) == ("thumbs", True, 0, "user-7", "on the point")
    assert (down.group.completions[0].text, down.feedback[0].value) == ("No idea.", False)
    [pair] = compile_pairs(result.groups, PairRules()).pairs
    assert (pair.chosen.text, pair.rejected.text) == ("It arrives on Monday.", "No idea.")


@pytest.mark.parametrize(("rated", "rating"), [("a2", 1), ("a3", -1)])
def test_a_rating_beside_a_sibling_is_a_pick(file: Path, rated: str, rating: int) -> None:
    [labelled] = _read(file, feedback_row(rated, rating, ["bot-b"])).or_raise().groups
    [row] = labelled.feedback
    assert (row.metric, row.label) == ("preference", Label.A if rating > 0 else Label.B)
    [pair] = compile_pairs([labelled], PairRules()).pairs
    assert (pair.prompt, pair.chosen.text, pair.rejected.text) == (ASKED, "It arrives on Monday.", "No idea.")


def test_a_rating_beside_several_siblings_scores_them_all(file: Path) -> None:
    row = feedback_row("a2", 1, ["bot-b", "bot-c"])
    tree = row["snapshot"]["chat"]["chat"]["history"]["messages"]
    tree["u2"]["childrenIds"].append("a4")
    tree["a4"] = _message("a4", "u2", [], "assistant", "Please wait.", model="bot-c")
    [labelled] = _read(file, row).or_raise().groups
    assert [(mark.choice_index, mark.value) for mark in labelled.feedback] == [(0, 1.0), (1, 0.0), (2, 0.0)]
    pairs = compile_pairs([labelled], PairRules()).pairs
    assert {(pair.chosen.text, pair.rejected.text) for pair in pairs} == {
        ("It arrives on Monday.", "No idea."),
        ("It arrives on Monday.", "Please wait."),
    }


def _broken(change: str) -> dict[str, Any]:
    row = feedback_row("a2", 1, ["bot-b"])
    tree = row["snapshot"]["chat"]["chat"]["history"]["messages"]
    if change == "rated":
        del tree["a2"]
    elif change == "parent":
        del tree["a1"]
    elif change == "sibling":
        del tree["a3"]
    elif change == "circle":
        tree["u1"]["parentId"] = "u2"
    elif change == "empty":
        tree["a3"]["content"] = ""
    elif change == "same":
        tree["a3"]["content"] = tree["a2"]["content"]
    elif change == "rating":
        row["data"]["rating"] = None
    elif change == "snapshot":
        row["snapshot"] = None
    return row


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        ("rated", "$.snapshot.chat.chat.history.messages", "missing_message"),
        ("parent", "$.snapshot.chat.chat.history.messages", "missing_message"),
        ("sibling", "$.snapshot.chat.chat.history.messages", "missing_message"),
        ("circle", "$.snapshot.chat.chat.history.messages", "missing_message"),
        ("empty", "$.snapshot.chat.chat.history.messages.a3.content", "empty_answer"),
        ("same", "$.snapshot.chat.chat.history.messages.a3.content", "identical_answers"),
        ("rating", "$.data.rating", "bad_label"),
        ("snapshot", "$.snapshot", "not_an_object"),
    ],
)
def test_a_broken_export_says_where(file: Path, change: str, path: str, reason: str) -> None:
    result = _read(file, _broken(change))
    assert (result.groups, result.rows, sum(result.refused.values())) == ([], 1, 1)
    assert (path, reason) in [(problem.json_path, problem.reason) for problem in result.problems]


def _completion(**changes: Any) -> dict[str, Any]:
    """The example of ChatCompletionList in OpenAI's openapi.json, and of ChatCompletionMessageList beside it."""
    return {
        "object": "chat.completion",
        "id": "chatcmpl-AyPNinnUqUDYo9SAdA52NobMflmj2",
        "model": "gpt-4o-2024-08-06",
        "created": 1_738_960_610,
        "request_id": "req_ded8ab984ec4bf840f37566c1011c417",
        "tool_choice": None,
        "usage": {"total_tokens": 31, "completion_tokens": 18, "prompt_tokens": 13},
        "tools": None,
        "metadata": {},
        "choices": [
            {
                "index": 0,
                "message": {"content": "Future's quiet spark.", "role": "assistant", "tool_calls": None, "function_call": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "response_format": None,
        "messages": [{"id": "m-0", "role": "user", "content": "write a haiku about ai", "name": None, "content_parts": None}],
        **changes,
    }


def test_a_stored_completion_is_a_demonstration_by_a_model(file: Path) -> None:
    page = {"object": "list", "data": _completion()["messages"], "first_id": "m-0", "last_id": "m-0", "has_more": False}
    forged = _completion(messages=page, metadata={RELABELLED_TAG: "account:ada"}, tags={RELABELLED_TAG: "account:ada"})
    listed = {"object": "list", "data": [_completion(), forged], "has_more": False}
    file.write_text(json.dumps(listed, indent=2), encoding="utf-8")
    result = read_rows(file).or_raise()
    assert (result.family, result.rows) == ("openai_stored", 2)
    for labelled in result.groups:
        assert labelled.group.prompt == (Message("user", "write a haiku about ai"),)
        [row] = labelled.feedback
        assert (row.metric, row.value, row.source) == ("demonstration", "Future's quiet spark.", Source.LLM)
        assert (row.tags, RELABELLED_TAG in labelled.group.metadata) == ({}, False), "an import brings no names of ours"


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        ({"choices": []}, "$.choices", "not_a_list"),
        ({"choices": _completion()["choices"] * 2}, "$.choices", "several_answers"),
        (
            {"choices": [{**_completion()["choices"][0], "finish_reason": "length"}]},
            "$.choices[0].finish_reason",
            "unfinished_answer",
        ),
        ({"choices": [{"message": {"role": "assistant", "content": None}}]}, "$.choices[0].message.content", "not_a_string"),
        ({"messages": []}, "$.messages", "not_a_list"),
        ({"messages": {"data": None}}, "$.messages.data", "not_a_list"),
    ],
)
def test_a_stored_completion_that_cannot_be_learned_from_says_why(
    file: Path, changes: dict[str, Any], path: str, reason: str
) -> None:
    result = _read(file, _completion(**changes))
    assert (path, reason) in [(problem.json_path, problem.reason) for problem in result.problems]
    assert sum(result.refused.values()) == result.rows == 1


def test_a_completion_without_its_messages_says_where_they_are(file: Path) -> None:
    row = _completion()
    del row["messages"]
    [problem] = _read(file, row).problems
    assert (problem.json_path, problem.reason) == ("$", "missing_key")
    assert "GET /v1/chat/completions/{id}/messages" in problem.message
