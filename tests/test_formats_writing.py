"""Rows out and in: every family says again what it was given, or declines with a reason; nothing is lost in silence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.family_rows import ROWS, USER
from tests.row_drafts import anything, comparisons, demonstrations, meaning, scored, thumbs

from pairloop.errors import UserError
from pairloop.formats import FAMILIES, FORMATS, Rows, describe, read_rows, write_rows
from pairloop.formats.groups import draft_of_group
from pairloop.formats.registry import detect
from pairloop.formats.row import Draft, Mark
from pairloop.types import PREFERENCE_METRIC, Label, LabelledGroup, Message, PairSide, PreferencePair, Prompt, Source

WRITTEN = [name for name, family in FAMILIES.items() if family.write is not None]
SCORES = ("samples", "scored")
PLAIN_TOO = ("trl", "thumbs", "scored")
"""Families that hold a prompt which is a plain string."""
PICKS = {name: {Label.A, Label.B} for name in ("openai", "conversations", "trl", "responses", "candidates", *SCORES)}
PICKS |= {"rejected_message": {Label.A, Label.B}, "ranking": {Label.A, Label.B}, "comparisons": set(Label)}
PICKS |= {"picks": set(Label) - {Label.SKIP}, "thumbs": set(), "sft": set()}
"""The labels of one rater's pick that each family has a place for."""

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

PAIR = PreferencePair("pair_1", (Message("user", "Hi"),), PairSide("Hello!"), PairSide("What?"))


def _metric(draft: Draft) -> str:
    return draft.marks[0].metric


def _is_held(name: str, draft: Draft) -> bool:
    """Whether the family has a place for it, by the tables above."""
    if isinstance(draft.prompt, str) and name not in PLAIN_TOO:
        return False
    if _metric(draft) == PREFERENCE_METRIC:
        return {mark.label for mark in draft.marks} <= PICKS[name] and (len(draft.marks) == 1 or name == "comparisons")
    return {"score": name in SCORES, "thumbs": name == "thumbs", "demonstration": name == "sft"}[_metric(draft)]


@quick
@given(said=st.lists(anything, min_size=1, max_size=3))
@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_family_holds_comes_back_and_the_rest_is_counted(tmp_path: Path, name: str, said: list[Draft]) -> None:
    path = tmp_path / "rows.jsonl"
    written = write_rows(path, said, name, skip_refused=True)

    held = [draft for draft in said if _is_held(name, draft)]
    assert (written.rows, sum(written.refused.values())) == (len(held), len(said) - len(held))
    if not held:
        assert path.read_bytes() == b""
        return
    lines = path.read_bytes().splitlines()
    assert {getattr(detect(json.loads(line)), "name", None) for line in lines} == {name}
    again = [draft_of_group(labelled) for labelled in read_rows(path).or_raise().groups]
    scores = name in SCORES
    assert [meaning(draft, as_scores=scores) for draft in again] == [meaning(draft, as_scores=scores) for draft in held]
    # And once more: what was read is written to the same bytes.
    bytes_before = path.read_bytes()
    write_rows(path, again, name)
    assert path.read_bytes() == bytes_before


@quick
@given(said=st.data())
@pytest.mark.parametrize("name", WRITTEN)
def test_the_keys_of_a_written_row_show_one_family_only(name: str, said: st.DataObject) -> None:
    strategy = {"thumbs": thumbs(), "sft": demonstrations(), "scored": scored(), "samples": scored()}
    draft = said.draw(strategy.get(name, comparisons(st.sampled_from((Label.A, Label.B)))))
    if not _is_held(name, draft):
        return
    [line] = Rows(name).lines([draft])
    showing = [family.name for family in FAMILIES.values() if family.matches(json.loads(line))]
    # A conversation alone is what many rows hold: it is asked for last.
    assert [found for found in showing if found != "sft" or name == "sft"] == [name]


@pytest.mark.parametrize("name", WRITTEN)
def test_the_row_of_the_specification_is_written_back(tmp_path: Path, name: str) -> None:
    first, second = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    first.write_text(json.dumps(ROWS[name]) + "\n", encoding="utf-8")
    groups = read_rows(first).or_raise().groups
    assert write_rows(second, groups, name).rows == 1
    row = json.loads(second.read_text(encoding="utf-8"))
    assert set(ROWS[name]) <= set(row)
    assert [meaning(draft_of_group(labelled)) for labelled in read_rows(second).groups] == [
        meaning(draft_of_group(labelled)) for labelled in groups
    ]


ASKED = (Message("user", "Hi"),)


def _draft(*labels: Label, prompt: Prompt = ASKED) -> Draft:
    marks = tuple(Mark(PREFERENCE_METRIC, label=label, rater_id=f"r{i}") for i, label in enumerate(labels))
    return Draft(prompt, ("a", "b"), marks)


@pytest.mark.parametrize(
    ("name", "draft", "reason"),
    [
        ("openai", _draft(Label.TIE), "tie"),
        ("trl", _draft(Label.BOTH_BAD), "both_bad"),
        ("picks", _draft(Label.SKIP), "skip"),
        ("ranking", _draft(Label.A, Label.A), "several_raters"),
        ("openai", _draft(Label.A, prompt="plain"), "plain_prompt"),
        ("openai", _draft(), "unlabelled"),
        ("thumbs", _draft(Label.A), "preference"),
        ("sft", _draft(Label.A), "preference"),
        ("llama-factory", _draft(Label.A, prompt=(Message("assistant", "Hello"), Message("user", "Hi"))), "greeting"),
        ("axolotl", _draft(Label.A, prompt=(Message("developer", "x"), Message("user", "Hi"))), "developer_role"),
        ("axolotl", _draft(Label.A, prompt=(Message("tools", '[{"type": "function"}]'), Message("user", "Hi"))), "tools"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, name: str, draft: Draft, reason: str
) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"thumbs": ROWS["thumbs"], "sft": ROWS["sft"]}.get(name, ROWS["openai"])
    path.write_text(json.dumps(good) + "\n", encoding="utf-8")
    said: list[Draft | LabelledGroup] = [draft, *read_rows(path).or_raise().groups]
    path.unlink()

    with pytest.raises(UserError, match=rf"'{name}' cannot hold 1 of 2 rows \({reason} 1\)"):
        write_rows(path, said, name)
    assert list(tmp_path.iterdir()) == []
    result = write_rows(path, said, name, skip_refused=True)
    assert (result.rows, result.refused) == (1, {reason: 1})
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


def test_an_unknown_format_and_one_that_is_only_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown format 'csv'; known are openai, .*axolotl"):
        write_rows(tmp_path / "rows", [PAIR], "csv")
    with pytest.raises(UserError, match="'open_webui' is read, not written"):
        write_rows(tmp_path / "rows", [PAIR], "open_webui")


def test_who_said_it_goes_along(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [Draft((Message("user", "Hi"),), ("a", "b"), _draft(Label.A).marks, Source.LLM)], "trl")
    row = json.loads(path.read_text(encoding="utf-8"))
    assert (row["source"], row["rater_id"]) == ("llm", "r0")


def test_llama_factory_finds_its_entry_beside_the_rows_and_other_entries_stay(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"other": {"file_name": "other.json"}}', encoding="utf-8")
    path = tmp_path / "picks.jsonl"
    write_rows(path, [PAIR], "llama-factory")
    described = describe(path, "llama-factory")
    assert described == tmp_path / "dataset_info.json"
    entries = json.loads(described.read_text(encoding="utf-8"))
    entry = entries["picks"]
    assert (sorted(entries), entry["file_name"], entry["ranking"]) == (["other", "picks"], "picks.jsonl", True)
    row = json.loads(path.read_text(encoding="utf-8"))
    # Read as LLaMA-Factory reads it: by the entry's columns and tags.
    columns, tags = entry["columns"], entry["tags"]
    assert row[columns["messages"]] == [{tags["role_tag"]: tags["user_tag"], tags["content_tag"]: "Hi"}]
    chosen, rejected = (row[columns[side]] for side in ("chosen", "rejected"))
    assert [chosen[tags["content_tag"]], rejected[tags["content_tag"]]] == ["Hello!", "What?"]
    assert {chosen[tags["role_tag"]], rejected[tags["role_tag"]]} == {tags["assistant_tag"]}
    assert describe(path, "axolotl") is None


def test_every_format_takes_a_pair_but_those_of_one_answer() -> None:
    took: Counter[str] = Counter()
    for name in FORMATS:
        rows = Rows(name)
        list(rows.lines([PAIR]))
        took[name] = rows.written
    assert {name for name, count in took.items() if not count} == {"thumbs", "sft"}


def test_tools_are_written_where_each_family_has_them(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "order_status", "parameters": {}}}
    call = {"id": "c1", "type": "function", "function": {"name": "order_status", "arguments": '{"id": 7}'}}
    asked = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    asked += [{"role": "tool", "tool_call_id": "c1", "content": "late"}]
    row = {**ROWS["openai"], "input": {"messages": asked, "tools": [tool], "parallel_tool_calls": False}}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    groups = read_rows(path).or_raise().groups
    assert groups[0].group.prompt[0] == Message("tools", json.dumps([tool]))
    for name in ("openai", "trl", "ranking"):
        write_rows(path, groups, name)
        written = json.loads(path.read_text(encoding="utf-8"))
        holder = written["input"] if name == "openai" else written
        assert (holder["tools"], holder["parallel_tool_calls"]) == ([tool], False)
        turns = holder["prompt"] if name == "trl" else holder["messages"]
        assert turns[1:] == [{"role": "assistant", "content": "", "tool_calls": [call]}, asked[-1]]
