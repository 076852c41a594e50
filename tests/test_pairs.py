"""The pair builder's rules one by one, its books over anything, and the snapshot that the store keeps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stores import open_store

from pairloop.config import Config
from pairloop.formats import snapshot
from pairloop.loop import pairs
from pairloop.loop.pairs import CompiledPairs, Dropped, PairRules, compile_pairs, promotions_between
from pairloop.policy.fake import FakePolicy
from pairloop.store import Store, cycles, datasets, doctor, feedback, groups, marks, quarantines, runs, versions
from pairloop.store.quarantines import Quarantine
from pairloop.types import (
    Alias,
    Completion,
    Cycle,
    CycleState,
    CycleStep,
    Feedback,
    FinishReason,
    Group,
    GroupKind,
    Label,
    LabelledGroup,
    Message,
    Pool,
    PreferencePair,
    Prompt,
    Run,
    RunStatus,
    SamplingParams,
    Source,
    TrainingRow,
    Version,
    VersionKind,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = "support-bot"


def ask(text: str) -> Prompt:
    return (Message("user", text),)


def answered(text: str, version: int | None = 0) -> Completion:
    return Completion(text, tuple(text.encode()), (-0.5,) * len(text.encode()), version)


_numbers = iter(range(10**9))


def said(
    *answers: str | Completion,
    prompt: Prompt = "q",
    kind: GroupKind = GroupKind.TRAIN,
    pool: Pool = Pool.TRAIN,
    sampling: SamplingParams | None = None,
    rows: Sequence[Feedback] = (),
) -> LabelledGroup:
    """A group with these answers, and these rows about it."""
    number = next(_numbers)
    completions = tuple(answer if isinstance(answer, Completion) else answered(answer) for answer in answers)
    group = Group(
        f"chatcmpl-{number:09d}",
        POLICY,
        kind,
        pool,
        prompt,
        completions,
        NOW + timedelta(seconds=number),
        prompt_token_ids=(1, 2, 3),
        sampling=sampling or SamplingParams(),
    )
    return LabelledGroup(group, tuple(replace(row, group_id=group.group_id) for row in rows))


def row(metric: str, **fields: Any) -> Feedback:
    known: dict[str, Any] = {"source": Source.HUMAN, "rater_id": f"rater-{next(_numbers)}", "created_at": NOW} | fields
    return Feedback(f"feedback-{next(_numbers):09d}", "", metric, **known)


def pick(label: Label, **fields: Any) -> Feedback:
    return row("preference", label=label, **fields)


def thumb(value: bool, index: int = 0, **fields: Any) -> Feedback:
    return row("thumbs", value=value, choice_index=index, **fields)


def scores(*values: float, rater: str = "checks:score") -> list[Feedback]:
    return [row("score", value=v, choice_index=i, source=Source.CODE, rater_id=rater) for i, v in enumerate(values)]


def partly_known(labelled: LabelledGroup, n: int) -> LabelledGroup:
    """The first ``n`` rows were known to an earlier round."""
    return replace(labelled, earlier=frozenset(one.feedback_id for one in labelled.feedback[:n]))


def statements(found: Sequence[TrainingRow]) -> list[tuple[str, str]]:
    assert all(isinstance(pair, PreferencePair) for pair in found)
    return [(pair.chosen.text, pair.rejected.text) for pair in found if isinstance(pair, PreferencePair)]


def build(*labelled: LabelledGroup, **rules: Any) -> CompiledPairs:
    return compile_pairs(labelled, PairRules(**rules))


# --- picks


def test_a_pick_becomes_a_pair_with_its_record_and_lineage() -> None:
    chosen = said("left", "right", rows=[pick(Label.B)], sampling=SamplingParams(temperature=0.7))
    [pair] = build(chosen).train
    assert statements([pair]) == [("right", "left")]
    assert (pair.chosen.token_ids, pair.chosen.logps) == (tuple(b"right"), (-0.5,) * 5)
    assert (pair.prompt_token_ids, pair.sampled_by, pair.tempered, pair.source) == ((1, 2, 3), 0, True, Source.HUMAN)
    assert (pair.group_ids, pair.feedback_ids) == ((chosen.group.group_id,), (chosen.feedback[0].feedback_id,))


@pytest.mark.parametrize(("label", "reason"), [(Label.TIE, "tie"), (Label.BOTH_BAD, "both_bad"), (Label.SKIP, "skip")])
def test_what_is_no_pick_is_never_a_win(label: Label, reason: str) -> None:
    compiled = build(said("a", "b", rows=[pick(label)]))
    assert (compiled.pairs, compiled.dropped, compiled.counts["decided"]) == ([], {reason: 1}, 0)


@pytest.mark.parametrize(
    ("labels", "winner", "dropped"),
    [
        ("AAA", "a", {}),
        ("AAB", "a", {"outvoted": 1}),
        ("BTB", "b", {"outvoted": 1}),
        ("AB", None, {"majority_tie": 2}),
        ("ABT", None, {"majority_tie": 3}),
        ("TTT", None, {"majority_tie": 3}),
        ("TXA", None, {"majority_tie": 3}),
        ("SA", "a", {"skip": 1}),
        ("SST", None, {"skip": 2, "tie": 1}),
    ],
)
def test_the_majority_of_raters_decides(labels: str, winner: str | None, dropped: dict[str, int]) -> None:
    names = {"A": Label.A, "B": Label.B, "T": Label.TIE, "X": Label.BOTH_BAD, "S": Label.SKIP}
    compiled = build(said("a", "b", rows=[pick(names[letter]) for letter in labels]))
    assert [pair.chosen.text for pair in compiled.train] == ([winner] if winner else [])
    assert compiled.dropped == dropped


def test_people_outvote_judges_however_many() -> None:
    judges = [pick(Label.B, source=Source.LLM) for _ in range(3)]
    compiled = build(said("a", "b", rows=[*judges, pick(Label.A)]))
    assert (statements(compiled.train), compiled.dropped) == ([("a", "b")], {"outranked": 3})


def test_instant_picks_of_people_are_set_aside() -> None:
    rows = [pick(Label.A, latency_ms=999), pick(Label.A, latency_ms=1_000), pick(Label.A, latency_ms=1, source=Source.LLM)]
    compiled = build(*(said(f"a{i}", "b", rows=[one]) for i, one in enumerate(rows)), min_latency_ms=1_000)
    assert [pair.chosen.text for pair in compiled.train] == ["a1", "a2"]
    assert compiled.set_aside == {rows[0].feedback_id: "instant_pick"}


def test_one_rater_speaks_only_so_often() -> None:
    ann = [said(f"a{i}", "b", rows=[pick(Label.A, rater_id="ann")]) for i in range(4)]
    tie = said("x", "y", rows=[pick(Label.TIE, rater_id="ann")])
    imported = said("c", "d", kind=GroupKind.IMPORTED, rows=[pick(Label.A, rater_id="ann")])
    bob = said("z", "b", rows=[pick(Label.A, rater_id="bob")])
    compiled = build(tie, *ann, imported, bob, max_picks_per_rater=2)
    assert [pair.chosen.text for pair in compiled.train] == ["a0", "a1", "c", "z"]
    assert compiled.dropped == {"rater_cap": 2, "tie": 1}


# --- scores, edits, thumbs


def test_higher_scores_win_within_one_group_and_one_scorer() -> None:
    group = said("low", "high", "mid", rows=scores(0.0, 1.0, 0.5))
    assert sorted(statements(build(group).train)) == [("high", "low"), ("high", "mid"), ("mid", "low")]
    other = said("worse", "better", rows=[*scores(0.0, 0.0), *scores(2.0, 3.0, rater="other")])
    compiled = build(other, said("alone", rows=scores(1.0)))
    assert statements(compiled.train) == [("better", "worse")]
    assert compiled.dropped == {"equal_scores": 2, "score_without_partner": 1}


def test_scored_groups_are_counted_by_contrast() -> None:
    groups_ = [said("a", "b", rows=scores(*values)) for values in ((1, 1), (0, 0), (0, 0), (1, 0), (0.5, 0.5))]
    counts = build(*groups_).counts
    wanted = {"scored_groups": 5, "groups_with_contrast": 1, "all_correct": 1, "all_wrong": 2}
    assert {name: counts[name] for name in wanted} == wanted


def test_an_ideal_answer_beats_what_was_served() -> None:
    edit = said("a", "b", rows=[row("demonstration", value="ideal")])
    about_one = said("c", "d", rows=[row("demonstration", value="better d", choice_index=1)])
    compiled = build(edit, about_one)
    assert statements(compiled.train) == [("ideal", "a"), ("ideal", "b"), ("better d", "d")]
    assert {pair.sampled_by for pair in compiled.train} == {None}
    assert (compiled.train[0].chosen.token_ids, compiled.train[0].rejected.logps) == ((), ())


def test_clean_thumbs_of_one_prompt_pair_across_groups() -> None:
    ups = [said(text, rows=[thumb(True)]) for text in ("u1", "u2", "u1")]
    downs = [said(text, rows=[thumb(False)]) for text in ("d1",)]
    both = [said("mixed", rows=[thumb(value)]) for value in (True, False)]
    lone = said("u3", prompt="another", rows=[thumb(True)])
    compiled = build(*ups, *downs, *both, lone)
    assert sorted(statements(compiled.train)) == [("u1", "d1"), ("u2", "d1")]
    assert compiled.dropped == {"conflicting_thumbs": 2, "thumb_without_partner": 1}
    wanted = {"thumbs_up": 5, "thumbs_down": 2, "thumbed_answers": 5, "conflicting_labels": 1, "prompts_with_both": 1}
    assert {name: compiled.counts[name] for name in wanted} == wanted


def test_many_thumbs_on_one_prompt_stay_within_its_cap_and_use_most_rows() -> None:
    votes = [said(f"{value}-{i}", rows=[thumb(value)]) for value in (True, False) for i in range(300)]
    compiled = build(*votes, max_pairs_per_prompt=200)
    assert (len(compiled.train), compiled.counts["all_pairs"], compiled.counts["distinct_pairs"]) == (200, 90_000, 90_000)
    assert compiled.dropped == {"prompt_cap": 200}


# --- statements that meet


def test_the_same_statement_twice_is_one_pair_of_both() -> None:
    groups_ = [said("a", "b", rows=[pick(Label.A)]) for _ in range(3)]
    newer = said(answered("b", 4), answered("a", 4), rows=[pick(Label.B)])
    compiled = build(*groups_, newer)
    [pair] = compiled.train
    assert (len(pair.group_ids), len(pair.feedback_ids), pair.sampled_by, pair.weight) == (4, 4, 4, 1.0)
    assert (compiled.counts["all_pairs"], compiled.counts["distinct_pairs"], compiled.dropped) == (4, 1, {})


def test_contradictions_of_equal_rank_cancel_and_the_stronger_signal_stays() -> None:
    one, other = (said("a", "b", rows=[pick(label)]) for label in (Label.A, Label.B))
    compiled = build(one, other)
    assert (compiled.pairs, compiled.dropped) == ([], {"conflict": 2})
    compiled = build(one, said("a", "b", rows=scores(0.0, 1.0)))
    assert (statements(compiled.train), compiled.dropped) == ([("a", "b")], {"outranked": 2})
    elsewhere = said("a", "b", prompt="Q", rows=[pick(Label.B)])
    assert statements(build(one, elsewhere).train) == [("a", "b"), ("b", "a")]


def test_answers_that_are_equal_or_empty_make_no_pair() -> None:
    compiled = build(said("same", "same", rows=[pick(Label.A)]), said(" ", "words", rows=[pick(Label.A)]))
    assert (compiled.pairs, compiled.dropped) == ([], {"identical": 1, "empty_chosen": 1})
    assert statements(build(said("words", "", rows=[pick(Label.A)])).train) == [("words", "")]


def test_one_prompt_gives_only_so_many_pairs_and_the_stronger_signals_first() -> None:
    thumbs = [said(text, rows=[thumb(value)]) for text, value in (("up", True), ("down", False))]
    compiled = build(*thumbs, said("a", "b", rows=[pick(Label.A)]), max_pairs_per_prompt=1)
    assert (statements(compiled.train), compiled.dropped) == ([("a", "b")], {"prompt_cap": 2})


def test_a_pair_that_cannot_be_trained_on_is_refused_with_the_reason_given() -> None:
    long, short = said("x" * 9, "b", rows=[pick(Label.A)]), said("a", "b", rows=[pick(Label.A)])
    compiled = compile_pairs(
        [long, short], PairRules(), refuse=lambda pair: Dropped.OVER_LONG if len(statements([pair])[0][0]) > 5 else None
    )
    assert (statements(compiled.train), compiled.dropped) == ([("a", "b")], {"over_long": 1})


# --- which groups


def test_duels_abandoned_groups_and_groups_given_twice_take_no_part() -> None:
    duel = said("a", "b", kind=GroupKind.DUEL, rows=[pick(Label.A)])
    gone = said("a", Completion("b", finish_reason=FinishReason.ABANDONED), rows=[pick(Label.A)])
    whole = said("a", "b", rows=[pick(Label.A)])
    compiled = build(duel, gone, whole, whole)
    assert statements(compiled.train) == [("a", "b")]
    assert compiled.dropped == {"duel": 1, "abandoned": 1, "duplicate_group": 1}


def test_rows_that_are_not_about_preference_or_make_no_sense_are_named() -> None:
    odd = [row("comment", value="hm"), row("politeness", value=3.0, choice_index=0), thumb(True, 7), pick(Label.A)]
    no_thumb = row("thumbs", value="yes", choice_index=0)
    compiled = build(said("a", "b", "c", rows=[*odd, no_thumb, *scores(float("nan"))]))
    assert (compiled.pairs, compiled.dropped) == ([], {"comment": 1, "malformed": 4, "other_metric": 1})


def test_versions_too_many_promotions_away_are_stale() -> None:
    labelled = [said(answered(f"a{v}", v), answered("b", v), prompt=f"q{v}", rows=[pick(Label.A)]) for v in range(4)]
    compiled = build(*labelled, staleness={3: 0, 2: 1, 1: 2}, max_staleness=1)
    assert [pair.sampled_by for pair in compiled.train] == [2, 3]
    assert compiled.dropped == {"stale": 2}


def test_the_gate_pool_is_held_out_and_its_prompts_do_not_train() -> None:
    gate = said("a", "b", prompt=ask("Where is  my order?"), pool=Pool.GATE, kind=GroupKind.HELDOUT, rows=[pick(Label.A)])
    same = said("c", "d", prompt=ask("where is my\nORDER?"), rows=[pick(Label.A)])
    other = said("e", "f", prompt=ask("Where is my refund?"), rows=[pick(Label.A)])
    compiled = build(gate, same, other)
    assert (statements(compiled.heldout), statements(compiled.train)) == ([("a", "b")], [("e", "f")])
    assert compiled.dropped == {"prompt_in_heldout": 1}
    undecided = LabelledGroup(gate.group, (pick(Label.TIE),))
    assert statements(build(undecided, same).train) == [("c", "d")]


def test_a_share_of_imported_prompts_is_held_out_by_their_words() -> None:
    def imported(prompt: str) -> LabelledGroup:
        return said("a", "b", prompt=prompt, kind=GroupKind.IMPORTED, rows=[pick(Label.A)])

    compiled = build(*(imported(f"{word} {i}") for i in range(400) for word in ("Hello", "HELLO ")), heldout_share=0.1)
    assert 40 <= len(compiled.heldout) <= 120
    words = [{str(pair.prompt).lower().replace("  ", " ") for pair in part} for part in (compiled.train, compiled.heldout)]
    assert not words[0] & words[1]
    assert compiled.dropped == {}
    assert len(build(said("a", "b", rows=[pick(Label.A)]), heldout_share=1.0).train) == 1


def test_promotions_are_counted_along_the_tree_of_versions() -> None:
    def version(number: int, parent: int | None) -> Version:
        return Version(POLICY, number, VersionKind.ADAPTER, "", "", parent, None, None, NOW)

    tree = [version(n, p) for n, p in ((0, None), (1, 0), (2, 1), (3, 1), (4, 3))]
    assert promotions_between(tree, 3) == {0: 2, 1: 1, 2: 2, 3: 0, 4: 1}
    assert promotions_between([], 0) == {0: 0}


# --- over anything

answers = st.sampled_from(["a", "b", "c", "", " "])
versions_ = st.none() | st.integers(0, 3)
rows_ = st.one_of(
    st.builds(pick, st.sampled_from(Label), latency_ms=st.none() | st.integers(0, 2_000), rater_id=st.sampled_from("xyz")),
    st.builds(thumb, st.booleans(), st.integers(0, 2), source=st.sampled_from(Source)),
    st.integers(0, 1).flatmap(lambda i: st.builds(row, st.just("score"), value=st.floats(), choice_index=st.just(i))),
    st.builds(row, st.sampled_from(["demonstration", "comment", "other"]), value=st.none() | answers),
)
labelled_groups = st.builds(
    lambda texts, version, prompt, kind, pool, rows, known: partly_known(
        said(*(answered(text, version) for text in texts), prompt=prompt, kind=kind, pool=pool, rows=rows), known
    ),
    st.lists(answers, max_size=3),
    versions_,
    st.sampled_from(["p", "P ", "q"]),
    st.sampled_from(GroupKind),
    st.sampled_from(Pool),
    st.lists(rows_, max_size=4),
    st.sampled_from([0, 0, 1, 2]),
)
rule_sets = st.builds(
    PairRules,
    min_latency_ms=st.sampled_from([0, 1_000]),
    max_picks_per_rater=st.none() | st.integers(1, 3),
    max_pairs_per_prompt=st.none() | st.integers(1, 3),
    staleness=st.none() | st.just({0: 0, 1: 1, 2: 2}),
    max_staleness=st.integers(0, 2),
    heldout_share=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=300, deadline=None)
@given(evidence=st.lists(labelled_groups, max_size=8), rules=rule_sets)
def test_the_books_close_whatever_comes_in(evidence: list[LabelledGroup], rules: PairRules) -> None:
    compiled = compile_pairs(evidence, rules)

    given_ids = {one.feedback_id for labelled in evidence for one in labelled.feedback}
    used = {feedback_id for pair in compiled.pairs for feedback_id in pair.feedback_ids}
    assert used | compiled.set_aside.keys() == given_ids
    assert not used & compiled.set_aside.keys()
    assert (
        compiled.counts["feedback_rows"] == len(given_ids) == compiled.counts["feedback_used"] + sum(compiled.dropped.values())
    )
    known = {feedback_id for labelled in evidence for feedback_id in labelled.earlier}
    assert all(not known.issuperset(pair.feedback_ids) for pair in compiled.pairs)
    assert all((compiled.set_aside[one] == "earlier_round") == (one in known) for one in compiled.set_aside)
    for part in (compiled.train, compiled.heldout):
        told = {(pair.prompt, pair.chosen.text, pair.rejected.text) for pair in part}
        assert len(told) == len(part)
        assert not told & {(prompt, rejected, chosen) for prompt, chosen, rejected in told}
        assert all(chosen != rejected and chosen.strip() for _, chosen, rejected in told)
    heldout = {str(pair.prompt).strip().lower() for pair in compiled.heldout}
    assert not heldout & {str(pair.prompt).strip().lower() for pair in compiled.train}
    trained = {group_id for pair in compiled.train for group_id in pair.group_ids}
    assert all(
        labelled.group.pool is Pool.TRAIN and labelled.group.kind is not GroupKind.DUEL
        for labelled in evidence
        if labelled.group.group_id in trained
    )
    assert compile_pairs(evidence, rules) == compiled


# --- in the store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "artifacts") as opened:
        base = Version(POLICY, 0, VersionKind.BASE, "base", "", None, None, None, NOW)
        opened.write(lambda c: versions.insert(c, base))
        opened.write(lambda c: versions.set_alias(c, POLICY, Alias.CHAMPION, 0))
        yield opened


def put(store: Store, *labelled: LabelledGroup) -> None:
    def insert(c: Any) -> None:
        for one in labelled:
            groups.insert(c, one.group)
            for said_of_it in one.feedback:
                feedback.insert(c, said_of_it)

    store.write(insert)


def start_cycle(store: Store, number: int) -> str:
    steps = (CycleStep(CycleState.BUILDING, {}, NOW),)
    cycle = Cycle(f"cycle_{number}", POLICY, number, 0, "test", NOW, steps)
    store.write(lambda c: cycles.insert(c, cycle))
    return cycle.cycle_id


def champion(store: Store) -> int:
    with store.reading() as c:
        number = versions.alias(c, POLICY, Alias.CHAMPION)
    assert number is not None
    return number


def crown(store: Store, number: int) -> None:
    store.write(lambda c: versions.set_alias(c, POLICY, Alias.CHAMPION, number))


def train_on_new(store: Store, cycle_number: int) -> tuple[int, int]:
    """What a cycle of the champion makes of the new picks: (pairs trained on, the new version); (0, 0) without any."""
    parent = champion(store)
    cycle_id = start_cycle(store, cycle_number)
    dataset = pairs.run(store, None, Config(), cycle_id=cycle_id, parent=parent)
    store.write(lambda c: cycles.step(c, cycle_id, CycleStep(CycleState.HELD, {}, NOW)))
    if dataset is None:
        return 0, 0

    def insert(c: Any) -> int:
        number = versions.next_number(c, POLICY)
        made_of = Version(POLICY, number, VersionKind.ADAPTER, "v", "", parent, dataset.dataset_id, None, NOW)
        versions.insert(c, made_of)
        return number

    return dataset.n_train, store.write(insert)


def test_a_dataset_is_a_snapshot_with_lineage_named_by_its_content(store: Store) -> None:
    train = [said(f"a{i}", "b", prompt=ask(f"q{i}"), rows=[pick(Label.A)]) for i in range(3)]
    gate = said("g", "h", prompt=ask("gate"), kind=GroupKind.HELDOUT, pool=Pool.GATE, rows=[pick(Label.B)])
    tie = said("t", "u", rows=[pick(Label.TIE)])
    put(store, *train, gate, tie)
    config = Config()

    dataset = pairs.run(store, FakePolicy().tokens, config, cycle_id=None, parent=0)

    assert dataset is not None
    assert (dataset.n_train, dataset.n_heldout, dataset.dropped) == (3, 1, {"tie": 1})
    assert dataset.counts["feedback_rows"] == 5
    folder = Path(dataset.path)
    assert [pair.chosen.text for pair in snapshot.read(folder / "train.jsonl")] == ["a0", "a1", "a2"]
    [heldout] = snapshot.read(folder / "heldout.jsonl")
    assert statements([heldout]) == [("h", "g")]
    assert tie.feedback[0].feedback_id in (folder / "set_aside.jsonl").read_text()
    with store.reading() as c:
        assert datasets.get(c, dataset.dataset_id) == dataset
        assert datasets.lineage(c, heldout.pair_id) == ([gate.group.group_id], [gate.feedback[0].feedback_id])
        assert datasets.containing_feedback(c, train[0].feedback[0].feedback_id) == [dataset.dataset_id]
    assert doctor.check(store) == []

    again = pairs.run(store, FakePolicy().tokens, config, cycle_id=None, parent=0)
    assert again == dataset


def test_held_picks_come_again_and_promoted_ones_do_not(store: Store) -> None:
    put(store, said("a", "b", prompt="one", rows=[pick(Label.A)]))
    assert train_on_new(store, 1) == (1, 1)  # held
    put(store, said("a", "b", prompt="two", rows=[pick(Label.A)]))
    assert train_on_new(store, 2) == (2, 2)
    crown(store, 2)
    assert train_on_new(store, 3) == (0, 0)
    put(store, said("a", "b", prompt="three", rows=[pick(Label.A)]))
    assert train_on_new(store, 4) == (1, 3)
    assert pairs.count_new(store, Config()) == 0
    crown(store, 1)  # by hand: it has seen the first pick, and no other
    assert train_on_new(store, 5) == (2, 4)


def test_the_picks_of_a_version_that_was_rolled_back_are_new_to_the_one_before(store: Store) -> None:
    put(store, said("a", "b", prompt="one", rows=[pick(Label.A)]))
    _, number = train_on_new(store, 1)
    crown(store, number)
    assert train_on_new(store, 2) == (0, 0)
    crown(store, 0)
    assert pairs.count_new(store, Config()) == 0  # they start no cycle; the next one has them again
    put(store, said("a", "b", prompt="two", rows=[pick(Label.A)]))
    assert pairs.count_new(store, Config()) == 1
    assert train_on_new(store, 3)[0] == 2


def test_feedback_that_comes_late_does_not_train_the_earlier_rows_again(store: Store) -> None:
    picked = said("a", "b", prompt="one", rows=[pick(Label.A, rater_id="ann")])
    liked = said("good", prompt="two", rows=[thumb(True)])
    scored = said("high", "low", prompt="three", rows=scores(1.0, 0.0))
    put(store, picked, liked, scored)
    _, number = train_on_new(store, 1)
    crown(store, number)

    def late(group: Group, *rows: Feedback) -> None:
        store.write(lambda c: [feedback.insert(c, replace(one, group_id=group.group_id)) for one in rows])

    late(picked.group, row("comment", text="well said"), thumb(True, 0))
    late(scored.group, row("comment", text="who scored that?"))
    new = pairs.compile_new(store, None, Config(), parent=number)
    assert new.compiled.pairs == []
    assert new.dropped == {"comment": 2, "earlier_round": 3, "thumb_without_partner": 1}
    assert new.text == "no new usable pairs: 3 earlier round, 2 comment, 1 thumb without partner"
    late(liked.group, row("comment", text="thanks"))
    put(store, said("bad", prompt="two", rows=[thumb(False)]))  # new, against an answer that was liked before
    late(picked.group, pick(Label.A, rater_id="ann"))  # says the same again
    assert statements(pairs.compile_new(store, None, Config(), parent=number).compiled.train) == [("good", "bad")]
    late(picked.group, pick(Label.B, rater_id="ann"))  # another mind
    new = pairs.compile_new(store, None, Config(), parent=number)
    assert statements(new.compiled.train) == [("b", "a"), ("good", "bad")]
    assert statements(pairs.compile_new(store, None, Config(), parent=0).compiled.train)[0] == ("b", "a")


def test_earlier_rows_still_vote() -> None:
    two_to_one = said("a", "b", rows=[pick(Label.A), pick(Label.A), pick(Label.B)])
    assert statements(build(partly_known(two_to_one, 2)).train) == []  # the new one is outvoted
    assert build(partly_known(two_to_one, 2)).dropped == {"earlier_round": 2, "outvoted": 1}
    agreed = said("a", "b", rows=[pick(Label.A), pick(Label.A)])
    assert statements(build(partly_known(agreed, 1)).train) == [("a", "b")]
    assert build(agreed, max_picks_per_rater=1).dropped == {}
    same_rater = [said("a", "b", prompt=f"q{i}", rows=[pick(Label.A, rater_id="ann")]) for i in range(2)]
    assert build(partly_known(same_rater[0], 1), same_rater[1], max_picks_per_rater=1).dropped == {"earlier_round": 1}


def test_where_nothing_is_left_the_reasons_are_told_most_frequent_first(store: Store) -> None:
    assert pairs.compile_new(store, None, Config(), parent=0).text == "no new usable pairs: no new feedback"
    ties = [said("a", "b", rows=[pick(Label.TIE)]) for _ in range(3)]
    bad = [said("a", "b", rows=[pick(Label.BOTH_BAD)]) for _ in range(2)]
    gate = said("g", "h", prompt="gate", pool=Pool.GATE, kind=GroupKind.HELDOUT, rows=[pick(Label.A)])
    put(store, *ties, *bad, gate, said("a", "a", rows=[pick(Label.A)]), said("a", "b", rows=[row("comment", text="x")]))
    new = pairs.compile_new(store, None, Config(), parent=0)
    assert new.text == "no new usable pairs: 1 held out, 3 tie, 2 both bad, 1 comment, 1 for other reasons"
    assert (new.dropped["identical"], new.counts["heldout_pairs"]) == (1, 1)
    assert pairs.run(store, None, Config(), cycle_id=None, parent=0) is None


def test_a_dataset_built_by_hand_starts_the_count_of_new_pairs_over_only_once_a_cycle_trains_on_it(store: Store) -> None:
    config = Config.model_validate({"label": {"verifier": "checks:score"}})
    put(store, said("a", "b", rows=[pick(Label.A)]), said("a", "b"))
    assert pairs.count_new(store, config) == 2
    built = pairs.run(store, None, Config(), cycle_id=None, parent=0)
    assert built is not None
    assert pairs.count_new(store, config) == 2
    assert pairs.run(store, None, Config(), cycle_id=start_cycle(store, 1), parent=0) == built
    run = Run("run_1", POLICY, "cycle_1", built.dataset_id, 0, RunStatus.SUCCEEDED, "me", 1, NOW, NOW, {}, {}, None, NOW)
    store.write(lambda c: runs.insert(c, run))
    assert pairs.count_new(store, config) == 0


def test_duels_and_undecided_picks_are_nothing_to_train(store: Store) -> None:
    duel = said("a", "b", kind=GroupKind.DUEL, pool=Pool.GATE, rows=[pick(Label.A)])
    put(store, duel, said("c", "d", rows=[pick(Label.TIE)]))
    assert pairs.run(store, None, Config(), cycle_id=None, parent=0) is None
    new = pairs.compile_new(store, None, Config(), parent=0)
    assert (new.compiled.dropped, new.feedback_seq) == ({"tie": 1}, 2)
    with store.reading() as c:
        assert datasets.list_(c, POLICY) == []


def test_over_long_pairs_are_dropped_by_the_models_own_count(store: Store) -> None:
    imported = [
        said(Completion("x" * n), Completion("y"), kind=GroupKind.IMPORTED, prompt=f"q{n}", rows=[pick(Label.A)])
        for n in (5, 50)
    ]
    put(store, *imported, said("z" * 60, "b", rows=[pick(Label.A)]))
    config = Config.model_validate({"train": {"max_length": 30}, "pairs": {"heldout_share": 0}})
    dataset = pairs.run(store, FakePolicy().tokens, config, cycle_id=None, parent=0)
    assert dataset is not None
    assert (dataset.n_train, dataset.dropped) == (1, {"over_long": 2})


def test_new_pairs_are_counted_without_reading_them(store: Store) -> None:
    config = Config()
    labelling = Config.model_validate({"label": {"verifier": "checks:score"}})
    assert pairs.count_new(store, config) == 0
    put(
        store,
        said("a", "b", rows=[pick(Label.A)]),
        said("a", "b", rows=[pick(Label.TIE)]),
        said("a", "b", rows=scores(0.0, 1.0)),
        said("a", "b", rows=scores(1.0, 1.0)),
        said("a", "b", prompt="gate", pool=Pool.GATE, kind=GroupKind.HELDOUT, rows=[pick(Label.A)]),
        said("a", "b"),
        said("a"),
    )
    assert (pairs.count_new(store, config), pairs.count_new(store, labelling)) == (2, 3)
    assert pairs.run(store, None, config, cycle_id=start_cycle(store, 1), parent=0) is not None
    assert pairs.count_new(store, config) == 0
    put(store, said("c", "d", rows=[pick(Label.B)]))
    assert pairs.count_new(store, config) == 1


def test_a_count_of_new_pairs_is_kept_until_something_is_written_that_it_counts_from(store: Store) -> None:
    one, other = said("a", "b", rows=[pick(Label.A)]), said("c", "d", rows=[pick(Label.B)])
    labelling = Config.model_validate({"label": {"verifier": "checks:score"}})
    excluded, rater = [one.group.group_id], other.feedback[0].rater_id
    held = Quarantine(rater, quarantines.Action.QUARANTINE, "why", NOW)
    mark = partial(marks.put, policy=POLICY, mark=marks.Mark.EXCLUDED, group_ids=excluded, reason="why", at=NOW)
    steps: list[tuple[Callable[[], object], int]] = [
        (lambda: put(store, one, other), 2),
        (lambda: store.write(partial(mark, is_set=True)), 1),
        (lambda: store.write(lambda c: quarantines.insert(c, POLICY, held)), 0),
        (lambda: store.write(partial(mark, is_set=False)), 1),
        (lambda: pairs.run(store, None, Config(), cycle_id=start_cycle(store, 1), parent=0), 0),
        (lambda: put(store, said("e", "f", rows=[pick(Label.A)])), 1),
    ]
    kept = pairs.counted_new(store, Config(), None)
    for write, expected in steps:
        assert pairs.counted_new(store, Config(), kept) is kept
        write()
        kept = pairs.counted_new(store, Config(), kept)
        assert kept.number == pairs.count_new(store, Config()) == expected
        timed = pairs.counted_new(store, labelling, None)  # what is due to be labelled comes by itself
        assert pairs.counted_new(store, labelling, timed) is not timed


def test_the_order_in_which_feedback_arrived_does_not_change_the_dataset(tmp_path: Path) -> None:
    labelled = [said(f"a{i}", f"b{i % 3}", prompt=ask(f"q{i % 5}"), rows=[pick(Label.A), pick(Label.A)]) for i in range(20)]
    made = []
    for name in ("one", "other"):
        with open_store(tmp_path / name / "artifacts") as store:
            put(store, *labelled)
            made.append(pairs.run(store, None, Config(), cycle_id=None, parent=0))
        random.Random(0).shuffle(labelled)
    assert made[0] is not None
    assert made[1] is not None
    assert made[0].dataset_id == made[1].dataset_id
