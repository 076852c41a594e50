"""Dataset rows: what each family reads, every way in which a row is refused, and that nothing is lost on the way out and in."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pairloop.errors import RowsError, UserError
from pairloop.formats import ReadResult, check_rows, each_group, read_rows, snapshot
from pairloop.loop.pairs import PairRules, compile_pairs
from pairloop.types import GroupKind, Label, Message, PairSide, Pool, PreferencePair, Source, ToolCall, with_tools

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


def _read(path: Path, *rows: object, **options: Any) -> ReadResult:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return read_rows(path, **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


# --- what is read


@pytest.mark.parametrize("name", ROWS)
def test_each_family_is_recognised_and_read(file: Path, name: str) -> None:
    result = _read(file, ROWS[name])

    assert (result.family, result.problems, result.rows) == (name, [], 1)
    labelled = result.groups[0]
    assert labelled.group.prompt == (Message("user", "Where is my order?"),)
    assert [completion.text for completion in labelled.group.completions] == [GOOD, BAD][: 1 if name in ALONE else 2]
    assert (labelled.group.kind, labelled.group.pool) == (GroupKind.IMPORTED, Pool.TRAIN)
    assert all(completion.token_ids == () and completion.version is None for completion in labelled.group.completions)
    assert all(row.source is Source.HUMAN and row.group_id == labelled.group.group_id for row in labelled.feedback)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ALONE])
def test_each_family_of_two_answers_prefers_the_better_one(file: Path, name: str) -> None:
    [pair] = compile_pairs(_read(file, ROWS[name]).groups, PairRules()).pairs
    assert (pair.chosen.text, pair.rejected.text) == (GOOD, BAD)


def test_a_conversation_pair_may_be_two_plain_lists(file: Path) -> None:
    [labelled] = _read(file, {"chosen": [*USER, MESSAGES[0]], "rejected": [*USER, MESSAGES[1]]}).groups
    assert labelled.group.prompt == (Message("user", "Where is my order?"),)


def test_a_plain_string_prompt_stays_a_string(file: Path) -> None:
    [pair] = _read(file, {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}).groups
    assert (pair.group.prompt, pair.group.completions[0].text) == ("2 + 2 =", " 4")
    [thumb] = _read(file, {"prompt": "2 + 2 =", "completion": " 4", "label": False}).groups
    assert (thumb.group.prompt, thumb.feedback[0].value) == ("2 + 2 =", False)


@pytest.mark.parametrize("answers", ["responses", "completions", "samples"])
@pytest.mark.parametrize("text", ["content", "text", "response"])
@pytest.mark.parametrize("score", ["score", "reward"])
def test_scored_groups_are_spelled_in_many_ways(file: Path, answers: str, text: str, score: str) -> None:
    row = {"messages": USER, answers: [{text: GOOD, score: True}, {text: BAD, score: -1}, {text: GOOD, score: 0.5}]}
    [labelled] = _read(file, row).groups
    assert [(row.choice_index, row.value) for row in labelled.feedback] == [(0, 1.0), (1, -1.0), (2, 0.5)]


def test_a_comparison_may_carry_the_picks_of_several_raters(file: Path) -> None:
    comparison = ROWS["comparisons"]["comparison"]
    named = [{"rater_id": "ann", "label": "B"}, {"rater_id": "bob", "label": "Tie"}]
    result = _read(file, {"comparison": comparison, "labels": ["A", "A"]}, {"comparison": comparison, "labels": named})
    unnamed, ann_and_bob = ([(row.rater_id, row.label) for row in labelled.feedback] for labelled in result.groups)
    assert unnamed == [("rater-1", Label.A), ("rater-2", Label.A)]
    assert ann_and_bob == [("ann", Label.B), ("bob", Label.TIE)]
    assert result.counts == {"prompts_in_file": 1, "unanimous_in_file": 1}


def test_a_row_may_name_its_source_and_rater(file: Path) -> None:
    [labelled] = _read(file, {**ROWS["trl"], "source": "llm", "rater_id": "judge-7"}).groups
    assert (labelled.feedback[0].source, labelled.feedback[0].rater_id) == (Source.LLM, "judge-7")


def test_a_system_message_and_a_greeting_may_come_first(file: Path) -> None:
    prompt = [{"role": "system", "content": ""}, {"role": "assistant", "content": "Hello!"}, *USER]
    [labelled] = _read(file, {**ROWS["responses"], "messages": prompt}).groups
    assert [message.role for message in labelled.group.prompt if isinstance(message, Message)] == [
        "system",
        "assistant",
        "user",
    ]


def test_an_array_reads_like_lines_and_its_rows_are_numbered_by_place(file: Path) -> None:
    rows = [ROWS["trl"], {**ROWS["trl"], "chosen": [MESSAGES[1]]}, ROWS["trl"]]
    lines = _read(file, *rows)
    file.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    array = read_rows(file)
    assert [labelled.group.completions for labelled in array.groups] == [
        labelled.group.completions for labelled in lines.groups
    ]
    assert (
        [(p.line, p.reason) for p in array.problems]
        == [(p.line, p.reason) for p in lines.problems]
        == [(2, "identical_answers")]
    )


def test_a_page_of_the_api_stands_for_its_data(file: Path) -> None:
    rows = [ROWS["trl"], ROWS["trl"]]
    _read(file, *rows)
    page = {"object": "list", "data": rows, "first_id": "a", "last_id": "b", "has_more": False}
    expected = [labelled.group.group_id for labelled in read_rows(file).groups]
    for text in (json.dumps(page), json.dumps(page, indent=2), json.dumps(page) + "\n" + json.dumps(page)):
        file.write_text(text, encoding="utf-8")
        result = read_rows(file).or_raise()
        assert [labelled.group.group_id for labelled in result.groups][:2] == expected
        assert result.rows in (2, 4)


def test_blank_lines_crlf_and_a_byte_order_mark_do_no_harm(file: Path) -> None:
    line = json.dumps(ROWS["responses"]).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n\n")
    result = read_rows(file)
    assert (result.rows, len(result.groups), result.problems) == (2, 2, [])


def test_ids_follow_from_the_rows_alone(file: Path, tmp_path: Path) -> None:
    first = _read(file, ROWS["trl"], ROWS["thumbs"] | {"label": False}, family=None)
    assert first.refused == {"mixed_families": 1}
    twice = _read(file, ROWS["trl"], ROWS["trl"])
    ids = [labelled.group.group_id for labelled in twice.groups]
    assert len(set(ids)) == 2
    assert ids[0] == first.groups[0].group.group_id
    elsewhere = _read(tmp_path / "copy.jsonl", ROWS["trl"], ROWS["trl"])
    assert ids == [labelled.group.group_id for labelled in elsewhere.groups]
    assert ids != [labelled.group.group_id for labelled in read_rows(file, policy="other").groups]


# --- what is refused


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
    result = _read(file, row)
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_hundred_thousand_rows_are_checked_in_seconds_and_little_memory(file: Path) -> None:
    words = ["order", "parcel", "refund", "ship", "late", "account", "help", "thanks", "return", "invoice", "card", "monday"]
    with file.open("w", encoding="utf-8") as out:
        for number in range(100_000):
            said = " ".join(words[(number * k) % len(words)] for k in range(1, 100))
            asked = [{"role": "system", "content": "Help."}, {"role": "user", "content": f"{number} {said}"}]
            answers = {"preferred_output": [{"role": "assistant", "content": said}], "non_preferred_output": [MESSAGES[1]]}
            out.write(json.dumps({"input": {"messages": asked}, **answers}) + "\n")
    code = (
        "import pathlib, re, sys, time; from pairloop.formats import check_rows; check = check_rows(pathlib.Path(sys.argv[1]));"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1];"
        "print(check.kept, time.process_time(), int(peak) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True, timeout=100)
    kept, cpu_s, peak_mb = map(float, done.stdout.split())
    print(f"{file.stat().st_size / 1e6:.0f} MB: {cpu_s:.1f} CPU seconds, peak {peak_mb:.0f} MB")
    assert kept == 100_000
    assert cpu_s < 20
    assert peak_mb < 100


def test_groups_are_read_one_by_one(file: Path) -> None:
    file.write_text(f"{json.dumps(ROWS['trl'])}\n" * 3, encoding="utf-8")
    groups = each_group(file)
    first = next(groups)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(ROWS["trl"]) + "\n")
    assert [first, *groups] == read_rows(file, at=first.group.created_at).groups


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
        _read(file, ROWS["trl"], family="csv")


def test_a_named_family_is_not_guessed(file: Path) -> None:
    assert _read(file, ROWS["trl"], family="responses").refused == {"missing_key": 1}
    assert _read(file, {"rows": 1}, ROWS["trl"]).refused == {"missing_key": 1}


def test_rows_longer_than_allowed_are_refused(file: Path) -> None:
    longest = len("Where is my order?") + len(GOOD)
    assert len(_read(file, ROWS["trl"], max_chars=longest).groups) == 1
    assert _read(file, ROWS["trl"], max_chars=longest - 1).refused == {"over_long": 1}


# --- out and in

texts = st.text(min_size=1).filter(str.strip)
turns = st.lists(texts, min_size=1, max_size=5).map(
    lambda said: tuple(Message("user" if (len(said) - i) % 2 else "assistant", text) for i, text in enumerate(said))
)
conversations = st.tuples(st.none() | st.text(), turns).map(
    lambda both: both[1] if both[0] is None else (Message("system", both[0]), *both[1])
)
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts})}), min_size=1
)
calls = st.lists(st.builds(ToolCall, texts, texts, texts), min_size=1, max_size=2).map(tuple)
with_calls = st.tuples(tools, texts, calls).map(
    lambda said: with_tools(
        said[0],
        (
            Message("user", said[1]),
            Message("assistant", "", tool_calls=said[2]),
            *(Message("tool", said[1], tool_call_id=call.id) for call in said[2]),
        ),
    )
)
logps = st.lists(st.floats(max_value=0, allow_nan=False, allow_infinity=False), max_size=3).map(tuple)
token_ids = st.lists(st.integers(0, 200_000), max_size=3).map(tuple)
sides = st.builds(PairSide, texts, token_ids, logps)
ids = st.lists(texts, max_size=3).map(tuple)
pairs = st.builds(
    PreferencePair,
    pair_id=texts,
    prompt=texts | conversations,
    chosen=sides,
    rejected=sides,
    source=st.sampled_from(Source),
    prompt_token_ids=token_ids,
    sampled_by=st.none() | st.integers(0, 99),
    tempered=st.booleans(),
    weight=st.floats(min_value=0, max_value=1e6),
    group_ids=ids,
    feedback_ids=ids,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(written=st.lists(pairs | st.builds(replace, pairs, prompt=with_calls), max_size=4))
def test_a_snapshot_loses_nothing(tmp_path: Path, written: list[PreferencePair]) -> None:
    path = tmp_path / "train.jsonl"
    assert snapshot.write(path, written) == len(written)
    assert list(snapshot.read(path)) == written


def test_a_snapshot_is_also_a_file_of_the_family_openai(file: Path) -> None:
    pair = PreferencePair("pair_1", (Message("user", "Hi"),), PairSide("a", (1,), (-0.5,)), PairSide("b", (2,), (-0.25,)))
    snapshot.write(file, [pair])
    result = read_rows(file).or_raise()
    assert result.family == "openai"
    assert [completion.text for completion in result.groups[0].group.completions] == ["a", "b"]


def test_a_broken_snapshot_names_its_line(file: Path) -> None:
    snapshot.write(file, [PreferencePair("pair_1", "p", PairSide("a"), PairSide("b"))])
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(ROWS["openai"]) + "\n")
    with pytest.raises(RowsError, match=r"rows\.jsonl:2: .*not a row of a pairloop snapshot"):
        list(snapshot.read(file))
