"""The snapshot's own rows: nothing is lost on the way out and in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.family_rows import ROWS, file

from pairloop.errors import RowsError
from pairloop.formats import read_rows, snapshot
from pairloop.types import Message, PairSide, PreferencePair, Source, ToolCall, with_tools

__all__ = ["file"]  # the fixture

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
