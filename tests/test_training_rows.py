"""Demonstrations and scored groups: on disk, as tokens, and from feedback, as each objective wants them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.labelled_groups import answered, pick, row, said, scores, thumb
from tests.test_snapshot import conversations as talks
from tests.test_snapshot import ids, pairs, sides, texts, token_ids, with_calls

from pairloop.config import Config
from pairloop.errors import InvalidRequestError, RowsError
from pairloop.formats import snapshot
from pairloop.learner.data import Limits, UnfitRows, refuse_unfit, tokenize
from pairloop.loop.pairs import CompiledRows, PairRules, compile_file, compile_rows
from pairloop.policy.fake import EOS, FakeTokens
from pairloop.types import (
    Feedback,
    Label,
    LabelledGroup,
    PairSide,
    Pool,
    PreferencePair,
    Source,
    TrainingGroup,
    TrainingRow,
)

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
answers = st.lists(st.tuples(sides, st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=4)
groups = st.builds(
    lambda scored, **rest: TrainingGroup(
        answers=tuple(side for side, _ in scored), rewards=tuple(reward for _, reward in scored), **rest
    ),
    answers,
    row_id=texts,
    prompt=texts | talks | with_calls,
    source=st.sampled_from(Source),
    prompt_token_ids=token_ids,
    sampled_by=st.none() | st.integers(0, 99),
    tempered=st.booleans(),
    weight=st.floats(min_value=0, max_value=1e6),
    group_ids=ids,
    feedback_ids=ids,
)


# --- on disk


@quick
@given(written=st.lists(groups | pairs, max_size=5))
def test_a_snapshot_keeps_rows_of_every_kind(tmp_path: Path, written: list[TrainingRow]) -> None:
    path = tmp_path / "train.jsonl"
    assert snapshot.write(path, written) == len(written)
    assert list(snapshot.read_rows(path)) == written


OLD = (
    '{"input": {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Wie geht\'s? é"}], '
    '"tools": [], "parallel_tool_calls": true}, "preferred_output": [{"role": "assistant", "content": "Gut!"}], '
    '"non_preferred_output": [{"role": "assistant", "content": "Nein"}], "pairloop": {"pair_id": "pair_1", '
    '"prompt_is_text": false, "source": "code", "prompt_token_ids": [1, 2, 3], "chosen": {"token_ids": [5, 6], '
    '"logps": [-0.5, -1.25]}, "rejected": {"token_ids": [7], "logps": [-2.0]}, "sampled_by": 4, "tempered": true, '
    '"weight": 0.5, "group_ids": ["g1"], "feedback_ids": ["f1", "f2"]}}\n'
)
"""A row as version 0.1 wrote it."""


def test_pairs_of_older_snapshots_are_read_and_written_to_the_byte(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(OLD, encoding="utf-8")
    [pair] = snapshot.read(old)
    assert (pair.pair_id, pair.row_id, pair.chosen.logps) == ("pair_1", "pair_1", (-0.5, -1.25))
    snapshot.write(new, [pair])
    assert new.read_text(encoding="utf-8") == OLD


def test_where_pairs_are_needed_other_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    snapshot.write(path, [pair_of("a", "b"), demonstration("a")])
    with pytest.raises(RowsError, match=r"train.jsonl:2: \$: a demonstration stands where"):
        list(snapshot.read(path))


def test_a_group_has_one_reward_per_answer() -> None:
    with pytest.raises(ValueError, match="2 answers with 1 rewards"):
        TrainingGroup("g", "q", (PairSide("a"), PairSide("b")), (1.0,))
    with pytest.raises(ValueError, match="0 answers"):
        TrainingGroup("g", "q", (), ())


# --- as tokens


def pair_of(chosen: str, rejected: str, prompt: str = "q") -> PreferencePair:
    return PreferencePair(f"pair_{chosen}_{rejected}", prompt, PairSide(chosen), PairSide(rejected))


def demonstration(text: str, **fields: Any) -> TrainingGroup:
    return TrainingGroup(f"demo_{text}", fields.pop("prompt", "q"), (PairSide(text),), **fields)


def scored(*rewards: float, **fields: Any) -> TrainingGroup:
    sides_ = tuple(PairSide(f"answer {i}") for i in range(len(rewards)))
    return TrainingGroup(f"scored_{rewards}", fields.pop("prompt", "q"), fields.pop("answers", sides_), rewards, **fields)


def encode(*rows: TrainingRow, objective: str = "sft", max_length: int = 100) -> tuple[list[Any], dict[str, int]]:
    usable, dropped = tokenize(rows, FakeTokens(), Limits(max_length, EOS + 1), parent_version=3, objective=objective)
    return usable, dict(dropped)


def test_every_kind_becomes_a_group_of_tokens() -> None:
    recorded = tuple(PairSide("x", (65, EOS), (-1.0, -0.5)) for _ in range(2))
    other = PairSide("y", (66, EOS), (-1.0, -0.5))
    sampled = scored(0.5, 0.5, 0.9, answers=(*recorded, other), prompt_token_ids=(1,), sampled_by=3, weight=2.0, tempered=True)
    (demo, pair, group), dropped = encode(demonstration("hi"), pair_of("a", "b"), sampled)
    assert not dropped
    assert (demo.rewards, demo.is_demonstration, demo.is_fresh, demo.completions[0].token_ids) == (
        (1.0,),
        True,
        False,
        (*b"hi", EOS),
    )
    assert (pair.rewards, pair.is_demonstration) == ((1.0, 0.0), False)
    assert (group.rewards, group.is_fresh, group.weight, group.tempered) == ((0.5, 0.5, 0.9), True, 2.0, True)
    stale = encode(TrainingGroup("g", "q", recorded[:1], prompt_token_ids=(1,), sampled_by=2))[0][0]
    assert (stale.is_fresh, stale.is_recorded, stale.is_demonstration) == (False, True, False)


def test_every_row_that_is_not_used_has_a_reason() -> None:
    same = tuple(PairSide("same") for _ in range(3))
    rows = [
        demonstration("fine"),
        demonstration("x" * 200),
        demonstration("light", weight=0.0),
        demonstration("unknown", prompt_token_ids=(999,)),
        demonstration("silent", prompt=""),
        scored(1.0, 0.0, 0.5, answers=same),
        scored(1.0, float("nan")),
        scored(0.5, 0.5),
    ]
    usable, dropped = encode(*rows, objective="sft")
    assert [group.group_id for group in usable] == ["demo_fine", "scored_(0.5, 0.5)"]
    expected = dict.fromkeys(("over_long", "no_weight", "unknown_token", "template_refused", "same_tokens", "bad_reward"), 1)
    assert dropped == expected
    # Only the group family learns nothing from equal rewards.
    assert encode(scored(0.5, 0.5), scored(0.5, 0.6), objective="grpo")[1] == {"equal_rewards": 1}


@pytest.mark.parametrize("objective", ["dpo", "grpo", "orpo", "rloo"])
def test_demonstrations_do_not_fit_what_compares_answers(objective: str) -> None:
    with pytest.raises(UnfitRows, match=rf'"{objective}" compares answers, and 1 of the 2 rows are demonstrations.*"sft"'):
        refuse_unfit([pair_of("a", "b"), demonstration("a")], objective)


def test_larger_groups_do_not_fit_what_learns_from_pairs() -> None:
    with pytest.raises(UnfitRows, match=r'"dpo" learns from pairs, and 1 of the 2 rows.*"grpo"'):
        refuse_unfit([scored(1.0, 0.0), scored(1.0, 0.0, 0.5)], "dpo")


def test_what_fits_is_not_refused() -> None:
    refuse_unfit([pair_of("a", "b"), scored(1.0, 0.0, 0.5), demonstration("a")], "sft")
    refuse_unfit([pair_of("a", "b"), scored(1.0, 0.0, 0.5)], "grpo")
    refuse_unfit([pair_of("a", "b"), scored(0.3, 0.9)], "ipo")


# --- from feedback


def ideal(text: str | None = None, index: int | None = None) -> Feedback:
    return row("demonstration", text=text, choice_index=index)


def compiled(objective: str, *labelled: LabelledGroup, **rules: Any) -> CompiledRows:
    return compile_rows(labelled, PairRules(**rules), objective)


def said_by(rows: Sequence[TrainingRow]) -> list[Any]:
    """Texts and rewards of groups; chosen and rejected of pairs."""
    return [
        (one.chosen.text, one.rejected.text)
        if isinstance(one, PreferencePair)
        else [(side.text, reward) for side, reward in zip(one.answers, one.rewards, strict=True)]
        for one in rows
    ]


def test_supervised_training_takes_ideal_answers_and_the_best_chosen() -> None:
    found = compiled(
        "sft",
        said("served", "other", prompt="p", rows=[ideal("written")]),
        said("as it is", prompt="q", rows=[ideal(index=0)]),
        said("a", "b", prompt="r", rows=[pick(Label.B)]),
        said("high", "mid", "low", prompt="s", rows=scores(1.0, 0.5, 0.0)),
    )
    assert said_by(found.train) == [[("written", 1.0)], [("as it is", 1.0)], [("b", 1.0)], [("high", 1.0)]]
    assert (found.heldout, found.counts["feedback_used"]) == ([], 6)
    by_text = {one.answers[0].text: one for one in found.train if isinstance(one, TrainingGroup)}
    # What was sampled keeps its record, what somebody wrote has none.
    assert (by_text["written"].sampled_by, by_text["written"].answers[0].token_ids) == (None, ())
    assert (by_text["as it is"].sampled_by, by_text["b"].sampled_by) == (0, 0)
    assert by_text["b"].answers[0].logps == (-0.5,)


def test_the_same_ideal_answer_is_one_row_with_all_its_feedback() -> None:
    twice = [said("served", prompt="p", rows=[ideal("good")]), said("good", "bad", prompt="p", rows=[pick(Label.A)])]
    found = compiled("sft", *twice)
    assert said_by(found.train) == [[("good", 1.0)]]
    assert (found.counts["feedback_used"], found.dropped) == (2, {})


def test_the_group_family_takes_scored_groups_whole() -> None:
    found = compiled(
        "grpo",
        said("a", "b", "c", prompt="p", rows=scores(0.0, 1.0, 0.25)),
        said("d", "e", prompt="q", rows=[pick(Label.A)]),
        said("f", "g", prompt="r", rows=scores(0.5, 0.5)),
        said("h", "i", prompt="s", rows=[pick(Label.A), *scores(0.0, 1.0)]),
    )
    assert said_by(found.train) == [[("a", 0.0), ("b", 1.0), ("c", 0.25)], ("d", "e"), ("h", "i")]
    assert found.dropped == {"equal_scores": 2, "outranked": 2}
    [group] = [one for one in found.train if isinstance(one, TrainingGroup)]
    assert (group.sampled_by, group.source, group.answers[1].token_ids) == (0, Source.CODE, (98,))


def test_scorers_are_averaged_over_what_all_of_them_scored() -> None:
    one, other = scores(0.0, 1.0, 1.0, rater="one"), scores(1.0, 0.5, rater="other")
    assert said_by(compiled("rloo", said("a", "b", "c", rows=[*one, *other])).train) == [[("a", 0.5), ("b", 0.75)]]


def test_log_probs_go_along_only_where_one_version_sampled_all() -> None:
    mixed = said(answered("a", version=1), answered("b", version=2), rows=scores(0.0, 1.0))
    [group] = compiled("grpo", mixed).train
    assert isinstance(group, TrainingGroup)
    assert (group.sampled_by, [side.logps for side in group.answers]) == (None, [(), ()])


def test_other_objectives_get_pairs() -> None:
    labelled = [said("a", "b", "c", rows=scores(0.0, 1.0, 0.5)), said("as it is", rows=[ideal(index=0)])]
    found = compiled("dpo", *labelled)
    assert said_by(found.train) == [("b", "a"), ("b", "c"), ("c", "a")]
    assert found.dropped == {"demonstration_without_partner": 1}


def test_a_held_out_prompt_is_not_trained_on() -> None:
    judged = said("a", "b", prompt="P ", pool=Pool.GATE, rows=[pick(Label.A)])
    asked = said("c", "d", "e", prompt="p", rows=scores(0.0, 1.0, 0.5))
    found = compiled("grpo", judged, asked)
    assert (said_by(found.train), said_by(found.heldout)) == ([], [("a", "b")])
    assert found.dropped == {"prompt_in_heldout": 3}
    found = compiled("sft", judged, said("x", prompt="p", rows=[ideal("y")]), said("x", prompt="q", rows=[ideal("y")]))
    assert (said_by(found.train), said_by(found.heldout)) == ([[("y", 1.0)]], [("a", "b")])


def test_caps_and_earlier_rounds_hold_for_every_kind() -> None:
    many = [said("a", "b", "c", rows=scores(0.0, 1.0, float(i))) for i in range(3)]
    found = compiled("grpo", *many, max_pairs_per_prompt=2)
    assert (len(found.train), found.dropped) == (2, {"prompt_cap": 3})
    known = said("a", "b", rows=scores(0.0, 1.0))
    old = LabelledGroup(known.group, known.feedback, frozenset(one.feedback_id for one in known.feedback))
    assert compiled("grpo", old).dropped == {"earlier_round": 2}


rows_of_a_group = st.lists(
    st.one_of(
        st.sampled_from(Label).map(pick),
        st.tuples(st.booleans(), st.integers(0, 2)).map(lambda both: thumb(*both)),
        st.tuples(st.sampled_from((0.0, 0.5, 1.0)), st.integers(0, 2), st.sampled_from(("one", "two"))).map(
            lambda three: row("score", value=three[0], choice_index=three[1], source=Source.CODE, rater_id=three[2])
        ),
        st.tuples(st.none() | st.sampled_from(("a", "z", " ")), st.none() | st.integers(0, 2)).map(lambda both: ideal(*both)),
    ),
    max_size=6,
)
labelled_groups = st.builds(
    lambda answers, prompt, pool, rows: said(*answers, prompt=prompt, pool=pool, rows=rows),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3),
    st.sampled_from(("p", "P", "q")),
    st.sampled_from(Pool),
    rows_of_a_group,
)


@settings(max_examples=150, deadline=None)
@given(labelled=st.lists(labelled_groups, max_size=5), objective=st.sampled_from(("sft", "grpo", "dpo")))
def test_every_feedback_row_is_used_or_has_one_reason(labelled: list[LabelledGroup], objective: str) -> None:
    found = compiled(objective, *labelled)
    assert found.counts["feedback_rows"] == found.counts["feedback_used"] + sum(found.dropped.values())
    used = {feedback_id for one in found.pairs for feedback_id in one.feedback_ids}
    known = {one.feedback_id for group in labelled for one in group.feedback}
    assert not used & found.set_aside.keys()
    assert used | found.set_aside.keys() == known
    refuse_unfit(found.pairs, objective)
    held = {" ".join(str(one.prompt).casefold().split()) for one in found.heldout}
    assert not held & {" ".join(str(one.prompt).casefold().split()) for one in found.train}
    assert len({one.row_id for one in found.pairs}) == len(found.pairs)


def test_a_file_with_nothing_for_the_objective_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "q"}], "responses": [{"content": "a", "score": 0.5}] * 2}) + "\n"
    )
    with pytest.raises(InvalidRequestError, match="nothing to train on with objective 'grpo': 2 equal scores") as caught:
        compile_file(path, Config(), "grpo")
    assert (caught.value.param, caught.value.code) == ("training_file", "unfit_rows")
