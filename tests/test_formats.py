"""Dataset rows: what each family reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.family_rows import ALONE, BAD, GOOD, MESSAGES, ROWS, USER, file, read

from pairloop.formats import each_group, read_rows
from pairloop.loop.pairs import PairRules, compile_pairs
from pairloop.types import GroupKind, Label, Message, Pool, Source

__all__ = ["file"]  # the fixture


@pytest.mark.parametrize("name", ROWS)
def test_each_family_is_recognised_and_read(file: Path, name: str) -> None:
    result = read(file, ROWS[name])

    assert (result.family, result.problems, result.rows) == (name, [], 1)
    labelled = result.groups[0]
    assert labelled.group.prompt == (Message("user", "Where is my order?"),)
    assert [completion.text for completion in labelled.group.completions] == [GOOD, BAD][: 1 if name in ALONE else 2]
    assert (labelled.group.kind, labelled.group.pool) == (GroupKind.IMPORTED, Pool.TRAIN)
    assert all(completion.token_ids == () and completion.version is None for completion in labelled.group.completions)
    assert all(row.source is Source.HUMAN and row.group_id == labelled.group.group_id for row in labelled.feedback)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ALONE])
def test_each_family_of_two_answers_prefers_the_better_one(file: Path, name: str) -> None:
    [pair] = compile_pairs(read(file, ROWS[name]).groups, PairRules()).pairs
    assert (pair.chosen.text, pair.rejected.text) == (GOOD, BAD)


def test_a_conversation_pair_may_be_two_plain_lists(file: Path) -> None:
    [labelled] = read(file, {"chosen": [*USER, MESSAGES[0]], "rejected": [*USER, MESSAGES[1]]}).groups
    assert labelled.group.prompt == (Message("user", "Where is my order?"),)


def test_a_plain_string_prompt_stays_a_string(file: Path) -> None:
    [pair] = read(file, {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}).groups
    assert (pair.group.prompt, pair.group.completions[0].text) == ("2 + 2 =", " 4")
    [thumb] = read(file, {"prompt": "2 + 2 =", "completion": " 4", "label": False}).groups
    assert (thumb.group.prompt, thumb.feedback[0].value) == ("2 + 2 =", False)


@pytest.mark.parametrize("answers", ["responses", "completions", "samples"])
@pytest.mark.parametrize("text", ["content", "text", "response"])
@pytest.mark.parametrize("score", ["score", "reward"])
def test_scored_groups_are_spelled_in_many_ways(file: Path, answers: str, text: str, score: str) -> None:
    row = {"messages": USER, answers: [{text: GOOD, score: True}, {text: BAD, score: -1}, {text: GOOD, score: 0.5}]}
    [labelled] = read(file, row).groups
    assert [(row.choice_index, row.value) for row in labelled.feedback] == [(0, 1.0), (1, -1.0), (2, 0.5)]


def test_a_comparison_may_carry_the_picks_of_several_raters(file: Path) -> None:
    comparison = ROWS["comparisons"]["comparison"]
    named = [{"rater_id": "ann", "label": "B"}, {"rater_id": "bob", "label": "Tie"}]
    result = read(file, {"comparison": comparison, "labels": ["A", "A"]}, {"comparison": comparison, "labels": named})
    unnamed, ann_and_bob = ([(row.rater_id, row.label) for row in labelled.feedback] for labelled in result.groups)
    assert unnamed == [("rater-1", Label.A), ("rater-2", Label.A)]
    assert ann_and_bob == [("ann", Label.B), ("bob", Label.TIE)]
    assert result.counts == {"prompts_in_file": 1, "unanimous_in_file": 1}


def test_a_row_may_name_its_source_and_rater(file: Path) -> None:
    [labelled] = read(file, {**ROWS["trl"], "source": "llm", "rater_id": "judge-7"}).groups
    assert (labelled.feedback[0].source, labelled.feedback[0].rater_id) == (Source.LLM, "judge-7")


def test_a_system_message_and_a_greeting_may_come_first(file: Path) -> None:
    prompt = [{"role": "system", "content": ""}, {"role": "assistant", "content": "Hello!"}, *USER]
    [labelled] = read(file, {**ROWS["responses"], "messages": prompt}).groups
    assert [message.role for message in labelled.group.prompt if isinstance(message, Message)] == [
        "system",
        "assistant",
        "user",
    ]


def test_an_array_reads_like_lines_and_its_rows_are_numbered_by_place(file: Path) -> None:
    rows = [ROWS["trl"], {**ROWS["trl"], "chosen": [MESSAGES[1]]}, ROWS["trl"]]
    lines = read(file, *rows)
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
    read(file, *rows)
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
    first = read(file, ROWS["trl"], ROWS["thumbs"] | {"label": False}, family=None)
    assert first.refused == {"mixed_families": 1}
    twice = read(file, ROWS["trl"], ROWS["trl"])
    ids = [labelled.group.group_id for labelled in twice.groups]
    assert len(set(ids)) == 2
    assert ids[0] == first.groups[0].group.group_id
    elsewhere = read(tmp_path / "copy.jsonl", ROWS["trl"], ROWS["trl"])
    assert ids == [labelled.group.group_id for labelled in elsewhere.groups]
    assert ids != [labelled.group.group_id for labelled in read_rows(file, policy="other").groups]


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
