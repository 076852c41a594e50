"""Dataset rows: every way in which a row or a file is refused, with line, path and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.family_rows import BAD, GOOD, MESSAGES, ROWS, USER, file, read

from pairloop.errors import RowsError, UserError
from pairloop.formats import check_rows, read_rows

__all__ = ["file"]  # the fixture


def _without(name: str, key: str) -> dict[str, Any]:
    return {other: value for other, value in ROWS[name].items() if other != key}


def _openai(messages: object) -> dict[str, Any]:
    return {**ROWS["openai"], "input": {"messages": messages}}


def _turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} speaks"} for role in roles]


TOOL = {"type": "function", "function": {"name": "order_status", "parameters": {}}}


def _calls(*ids: str) -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": "order_status", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _answer(call_id: str) -> dict[str, str]:
    return {"role": "tool", "tool_call_id": call_id, "content": "late"}


def _candidates(*candidates: object, role: str = "assistant") -> dict[str, Any]:
    return {"messages": [*USER, {"role": role, "candidates": list(candidates)}]}


def _preferred(content: object) -> dict[str, object]:
    return {"content": content, "preferenceLabel": "preferred"}


_LABEL_OF_SECOND = "$.messages[1].candidates[1].preferenceLabel"

REFUSED: list[tuple[object, str, str]] = [
    (5, "$", "not_an_object"),
    ("text", "$", "not_an_object"),
    (_without("openai", "input"), "$", "missing_key"),
    (_without("openai", "preferred_output"), "$", "missing_key"),
    (_without("openai", "non_preferred_output"), "$", "missing_key"),
    ({**ROWS["openai"], "input": []}, "$.input", "not_an_object"),
    ({**ROWS["openai"], "input": {}}, "$.input", "missing_key"),
    ({**ROWS["openai"], "input": {"messages": USER, "tools": [{}]}}, "$.input.tools[0]", "bad_tool"),
    ({**ROWS["openai"], "input": {"messages": USER, "tools": {}}}, "$.input.tools", "bad_tool"),
    (
        {**ROWS["openai"], "input": {"messages": USER, "parallel_tool_calls": "no"}},
        "$.input.parallel_tool_calls",
        "not_a_boolean",
    ),
    (_openai(None), "$.input.messages", "not_a_list"),
    (_openai([]), "$.input.messages", "not_a_list"),
    (_openai([*USER, None]), "$.input.messages[1]", "not_an_object"),
    (_openai([{"content": "x"}]), "$.input.messages[0]", "missing_key"),
    (_openai([{"role": "user"}]), "$.input.messages[0]", "missing_key"),
    (_openai([{"role": "robot", "content": "x"}]), "$.input.messages[0].role", "wrong_role"),
    (_openai([{"role": "tool", "content": "x"}]), "$.input.messages[0]", "missing_key"),
    (_openai([{"role": "function", "content": "x"}]), "$.input.messages[0].role", "wrong_role"),
    (_openai([{"role": "user", "content": 123}]), "$.input.messages[0].content", "not_a_string"),
    (_openai([{"role": "user", "content": [{"type": "text"}]}]), "$.input.messages[0].content", "not_a_string"),
    (_openai([{"role": "user", "content": " "}]), "$.input.messages[0].content", "empty_turn"),
    (_openai([{"role": "user", "content": "\ud800"}]), "$.input.messages[0].content", "not_unicode"),
    (_openai(_turns("user", "assistant")), "$.input.messages[1].role", "turn_order"),
    (_openai(_turns("user", "user")), "$.input.messages[1].role", "turn_order"),
    (_openai(_turns("user", "system", "user")), "$.input.messages[1].role", "turn_order"),
    (_openai(_turns("system")), "$.input.messages[0].role", "turn_order"),
    ({**ROWS["openai"], "preferred_output": GOOD}, "$.preferred_output", "not_a_list"),
    ({**ROWS["openai"], "preferred_output": []}, "$.preferred_output", "answer_turns"),
    ({**ROWS["openai"], "preferred_output": [*MESSAGES]}, "$.preferred_output", "answer_turns"),
    ({**ROWS["openai"], "preferred_output": USER}, "$.preferred_output[0].role", "wrong_role"),
    ({**ROWS["openai"], "preferred_output": [MESSAGES[1]]}, "$.non_preferred_output[0].content", "identical_answers"),
    (
        {**ROWS["openai"], "preferred_output": [{**MESSAGES[0], "tool_calls": [{}]}]},
        "$.preferred_output[0].tool_calls",
        "tool_answer",
    ),
    ({**ROWS["openai"], "source": "robot"}, "$.source", "unknown_source"),
    ({**ROWS["openai"], "source": []}, "$.source", "unknown_source"),
    ({**ROWS["openai"], "rater_id": 7}, "$.rater_id", "bad_rater"),
    (_without("conversations", "rejected"), "$", "missing_key"),
    ({**ROWS["conversations"], "chosen": {}}, "$.chosen", "missing_key"),
    ({**ROWS["conversations"], "chosen": [MESSAGES[0]]}, "$.chosen", "not_a_list"),
    ({**ROWS["conversations"], "chosen": [*_turns("user"), MESSAGES[0]]}, "$", "prompts_differ"),
    ({**ROWS["conversations"], "chosen": [*USER, MESSAGES[0], *USER, MESSAGES[0]]}, "$", "prompts_differ"),
    ({**ROWS["conversations"], "rejected": [*USER, *USER]}, "$.rejected[1].role", "wrong_role"),
    (_without("trl", "chosen"), "$", "missing_key"),
    ({**ROWS["trl"], "prompt": 5}, "$.prompt", "not_a_list"),
    ({**ROWS["trl"], "prompt": "text"}, "$.chosen", "mixed_forms"),
    ({**ROWS["trl"], "chosen": GOOD}, "$.chosen", "mixed_forms"),
    ({"prompt": "p", "chosen": "a", "rejected": ""}, "$.rejected", "empty_answer"),
    ({"prompt": "p", "chosen": True, "rejected": "a"}, "$.chosen", "not_a_string"),
    ({"prompt": "p", "chosen": "a", "rejected": None}, "$.rejected", "not_a_string"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "$.prompt", "empty_prompt"),
    ({"prompt": "p", "completion": "a"}, "$", "missing_key"),
    ({"completion": "a", "label": True}, "$", "missing_key"),
    ({"prompt": "p", "completion": "a", "label": 1}, "$.label", "bad_label"),
    (_without("responses", "messages"), "$", "missing_key"),
    ({**ROWS["responses"], "preferred_response": "\n"}, "$.preferred_response", "empty_answer"),
    ({**ROWS["comparisons"], "label": "C"}, "$.label", "bad_label"),
    ({**ROWS["comparisons"], "label": None}, "$.label", "bad_label"),
    (_without("comparisons", "label"), "$", "missing_key"),
    ({**ROWS["comparisons"], "labels": ["A"]}, "$", "ambiguous_key"),
    ({**_without("comparisons", "label"), "labels": []}, "$.labels", "not_a_list"),
    ({**_without("comparisons", "label"), "labels": ["A", 3]}, "$.labels[1]", "bad_label"),
    ({**_without("comparisons", "label"), "labels": [{"label": "A", "rater_id": ""}]}, "$.labels[0].rater_id", "bad_rater"),
    ({**_without("comparisons", "label"), "labels": [{"label": "A", "rater_id": "x"}] * 2}, "$.labels", "duplicate_rater"),
    ({"comparison": "A over B", "label": "A"}, "$.comparison", "not_an_object"),
    ({**ROWS["scored"], "responses": []}, "$.responses", "not_a_list"),
    ({**ROWS["scored"], "samples": []}, "$", "ambiguous_key"),
    ({**ROWS["scored"], "prompt": "p"}, "$", "ambiguous_key"),
    ({"messages": USER, "responses": ["text"]}, "$.responses[0]", "not_an_object"),
    ({"messages": USER, "responses": [{"content": "a"}]}, "$.responses[0]", "missing_key"),
    ({"messages": USER, "responses": [{"score": 1}]}, "$.responses[0]", "missing_key"),
    ({"messages": USER, "responses": [{"content": "a", "text": "a", "score": 1}]}, "$.responses[0]", "ambiguous_key"),
    ({"messages": USER, "responses": [{"content": "a", "score": "high"}]}, "$.responses[0].score", "not_a_number"),
    ({"messages": USER, "responses": [{"content": "a", "score": 10**400}]}, "$.responses[0].score", "not_a_number"),
    ({"messages": USER, "responses": [{"content": 4, "score": 1}]}, "$.responses[0].content", "not_a_string"),
    ({"messages": USER, "responses": [{"content": "", "score": 1}]}, "$.responses[0].content", "empty_answer"),
    ({"question": "?", "answer": "!"}, "$", "unknown_family"),
    ({"samples": [{"messages": [*USER, MESSAGES[0]]}]}, "$.samples[0]", "missing_key"),
    ({"samples": [{"messages": USER, "score": 1}]}, "$.samples[0].messages", "not_a_list"),
    ({"samples": [{"messages": [*USER, MESSAGES[0]], "score": 1}, 7]}, "$.samples[1]", "not_an_object"),
    ({"samples": [{"messages": [*USER, MESSAGES[0]], "score": None}]}, "$.samples[0].score", "not_a_number"),
    (
        {"samples": [{"messages": [*said, MESSAGES[0]], "score": 1} for said in (USER, _turns("user"))]},
        "$",
        "prompts_differ",
    ),
    (_candidates({"content": GOOD}, {"content": BAD}), "$.messages[1].candidates[0]", "missing_key"),
    (_candidates(_preferred(GOOD)), "$.messages[1].candidates", "not_a_list"),
    (_candidates(_preferred(GOOD), _preferred(BAD)), "$.messages[1].candidates", "bad_label"),
    (_candidates(_preferred(GOOD), {**_preferred(BAD), "preferenceLabel": "worse"}), _LABEL_OF_SECOND, "bad_label"),
    (_candidates(_preferred(GOOD), _preferred(BAD), role="user"), "$.messages[1].role", "wrong_role"),
    (_candidates(_preferred([{"image": 1}]), _preferred(BAD)), "$.messages[1].candidates[0].content[0]", "missing_key"),
    (_candidates(_preferred(GOOD), 5), "$.messages[1].candidates[1]", "not_an_object"),
    ({"messages": [{"candidates": []}]}, "$.messages", "not_a_list"),
    ({**ROWS["rejected_message"], "rejected_message": "no"}, "$.rejected_message", "not_an_object"),
    ({**ROWS["rejected_message"], "rejected_message": MESSAGES[0]}, "$.rejected_message.content", "identical_answers"),
    ({**ROWS["rejected_message"], "messages": USER}, "$.messages", "not_a_list"),
    ({**ROWS["picks"], "tied": "both"}, "$.tied", "bad_label"),
    ({**ROWS["picks"], "tied": False}, "$.tied", "bad_label"),
    ({**ROWS["picks"], "preferred_completion": 4}, "$.preferred_completion", "not_a_list"),
    ({**ROWS["picks"], "other_completion": GOOD}, "$.other_completion", "identical_answers"),
    (_without("picks", "other_completion"), "$", "missing_key"),
    ({**ROWS["ranking"], "rejected": USER[0]}, "$.rejected.role", "wrong_role"),
    (_without("ranking", "rejected"), "$", "missing_key"),
    ({"messages": USER}, "$.messages", "not_a_list"),
    ({"messages": [*USER, *USER]}, "$.messages[1].role", "wrong_role"),
    ({"messages": [*USER, {**MESSAGES[0], "weight": 0}]}, "$.messages[1].weight", "untrained_answer"),
    ({"messages": [*USER, MESSAGES[0]], "label": "up"}, "$.label", "bad_label"),
    ({**ROWS["trl"], "tools": "[{"}, "$.tools", "bad_tool"),
    ({**ROWS["trl"], "tools": [{"type": "function", "function": {}}]}, "$.tools[0]", "bad_tool"),
    ({**ROWS["trl"], "tools": [{**TOOL, "x": "\ud800"}]}, "$.tools[0]", "not_unicode"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": [TOOL]}, "$.prompt", "mixed_forms"),
    (_openai([*USER, _calls("c1"), *USER]), "$.input.messages[2]", "missing_tool_answer"),
    (_openai([*USER, _calls("c1")]), "$.input.messages[1]", "missing_tool_answer"),
    (_openai([*USER, _calls("c1", "c2"), _answer("c1")]), "$.input.messages[2]", "missing_tool_answer"),
    (_openai([*USER, _answer("c1")]), "$.input.messages[1].tool_call_id", "unknown_tool_call"),
    (_openai([*USER, _calls("c1"), _answer("c2")]), "$.input.messages[2].tool_call_id", "unknown_tool_call"),
    (_openai([*USER, _calls("c1"), _answer("c1"), _answer("c1")]), "$.input.messages[3].tool_call_id", "duplicate_tool_answer"),
    (_openai([*USER, _calls("c1", "c1"), _answer("c1")]), "$.input.messages[1].tool_calls[1].id", "bad_tool_call"),
    (_openai([*USER, {"role": "assistant", "tool_calls": [{}]}]), "$.input.messages[1].tool_calls[0]", "bad_tool_call"),
    (_openai([*USER, {"role": "assistant", "tool_calls": 5}]), "$.input.messages[1].tool_calls", "bad_tool_call"),
    (_openai([{**USER[0], "tool_calls": _calls("c1")["tool_calls"]}]), "$.input.messages[0].tool_calls", "bad_tool_call"),
    (_openai([*USER, _calls("\ud800")]), "$.input.messages[1].tool_calls[0]", "not_unicode"),
    (_openai([*USER, _calls("c1"), {"role": "tool", "content": "x"}]), "$.input.messages[2]", "missing_key"),
    (_openai([*USER, _calls("c1"), {**_answer("c1"), "content": 5}]), "$.input.messages[2].content", "not_a_string"),
]


@pytest.mark.parametrize(("row", "path", "reason"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_refused_with_its_line_path_and_reason(file: Path, row: object, path: str, reason: str) -> None:
    result = read(file, row)
    assert (result.groups, result.rows, sum(result.refused.values())) == ([], 1, 1)
    assert (path, reason) in [(problem.json_path, problem.reason) for problem in result.problems]
    assert all((problem.file, problem.line) == (str(file), 1) and problem.message for problem in result.problems)


@pytest.mark.parametrize("name", ROWS)
def test_half_a_surrogate_pair_is_refused_in_every_family(file: Path, name: str) -> None:
    for text in (GOOD, "Where is my order?"):
        file.write_text(json.dumps(ROWS[name]).replace(text, "\\ud800 half"), encoding="utf-8")
        assert set(read_rows(file).refused) == {"not_unicode"}


def test_three_bad_rows_of_ten_thousand_are_named_and_no_other(file: Path) -> None:
    lines = [json.dumps(ROWS["openai"])] * 10_000
    lines[17] = json.dumps({**ROWS["openai"], "preferred_output": []})
    lines[5_000] = lines[5_000][:-9]
    lines[9_999] = json.dumps({**ROWS["openai"], "input": {"messages": _turns("user", "user")}})
    file.write_text("\n".join(lines), encoding="utf-8")

    check = check_rows(file)

    assert (check.rows, check.kept) == (10_000, 9_997)
    assert [(problem.line, problem.reason) for problem in check.problems] == [
        (18, "answer_turns"),
        (5_001, "not_json"),
        (10_000, "turn_order"),
    ]
    with pytest.raises(
        RowsError, match=r"3 of 10000 row\(s\) refused \(answer_turns 1, not_json 1, turn_order 1\):\n"
    ) as raised:
        check.or_raise()
    assert (raised.value.code, raised.value.refused) == ("bad_rows", {"answer_turns": 1, "not_json": 1, "turn_order": 1})


def test_every_bad_row_is_named_at_once_and_the_good_ones_are_kept(file: Path) -> None:
    good, bad = ROWS["responses"], {**ROWS["responses"], "messages": [{"role": "robot"}], "preferred_response": ""}
    file.write_text("\n".join([json.dumps(good), "{oops", json.dumps(bad), json.dumps(good)[:-30]]), encoding="utf-8")

    result = read_rows(file)

    assert (result.rows, len(result.groups), result.refused) == (4, 1, {"not_json": 2, "wrong_role": 1})
    assert [(p.line, p.json_path, p.reason) for p in result.problems] == [
        (2, "$", "not_json"),
        (3, "$.messages[0].role", "wrong_role"),
        (3, "$.preferred_response", "empty_answer"),
        (4, "$", "not_json"),
    ]
    assert "truncated" in result.problems[-1].message
    with pytest.raises(RowsError, match=r"rows\.jsonl:3: \$\.messages\[0\]\.role: unknown role 'robot'") as raised:
        result.or_raise()
    assert raised.value.problems == tuple(result.problems)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "lfs_pointer"),
        (b" \n\n", "empty_file"),
        (b"[]", "empty_file"),
        (b'{"prompt": "caf\xe9"}\n', "not_utf8"),
        (b'{"prompt": NaN}\n', "not_json"),
        (b'{"prompt": 1, "prompt": 2}\n', "duplicate_key"),
        (b'{"a":' * 100_000, "not_json"),
        (b'[{"prompt": "a"},\n {"prompt": "b"\n', "not_json"),
        (b"[1]\n[2]\n", "not_an_object"),
    ],
    ids=["lfs", "blank", "empty-array", "latin-1", "nan", "duplicate-key", "deep", "truncated-array", "arrays-as-rows"],
)
def test_a_file_that_is_no_rows_says_why(file: Path, data: bytes, reason: str) -> None:
    file.write_bytes(data)
    result = read_rows(file)
    assert (result.groups, set(result.refused)) == ([], {reason})
    assert result.rows == sum(result.refused.values())


def test_a_missing_file_and_an_unknown_family_are_errors(file: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_rows(file)
    with pytest.raises(UserError, match="unknown row family 'csv'; known are openai"):
        read(file, ROWS["trl"], family="csv")


def test_a_named_family_is_not_guessed(file: Path) -> None:
    assert read(file, ROWS["trl"], family="responses").refused == {"missing_key": 1}
    assert read(file, {"rows": 1}, ROWS["trl"]).refused == {"missing_key": 1}


def test_rows_longer_than_allowed_are_refused(file: Path) -> None:
    longest = len("Where is my order?") + len(GOOD)
    assert len(read(file, ROWS["trl"], max_chars=longest).groups) == 1
    assert read(file, ROWS["trl"], max_chars=longest - 1).refused == {"over_long": 1}
