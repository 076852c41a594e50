"""The query modules of the evidence: groups, their completions, feedback."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
from tests.store_rows import BOT, a_group, a_pick, minutes, put_groups, put_picks, read

from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.store import Store, feedback, groups
from pairloop.types import Completion, FinishReason, Group, GroupKind, Label, LabelledGroup, Message, Pool


def test_a_streamed_group_gets_its_completions_once(store: Store) -> None:
    put_groups(store, a_group("g", answers=()))
    assert read(store, groups.get, "g").is_abandoned
    answers = (Completion("a", version=0), Completion("b", version=0))
    store.write(lambda c: groups.finish(c, "g", answers))
    assert read(store, groups.get, "g").completions == answers
    with pytest.raises(ConflictError, match="written once"):
        store.write(lambda c: groups.finish(c, "g", answers))
    with pytest.raises(NotFoundError, match="no group nobody"):
        store.write(lambda c: groups.finish(c, "nobody", answers))
    assert read(store, groups.latest_answer, BOT, None, "b") == ("g", 1)


def test_latest_answer_is_the_newest_of_that_user_with_that_text(store: Store) -> None:
    put_groups(
        store,
        a_group("old", 1, user="ann"),
        a_group("new", 2, user="ann", answers=("maybe", "yes")),
        a_group("other user", 3, user="bob"),
        a_group("other policy", 4, user="ann", policy="x"),
        a_group("no user", 5),
    )
    assert read(store, groups.latest_answer, BOT, "ann", "yes") == ("new", 1)
    assert read(store, groups.latest_answer, BOT, "ann", "no") == ("old", 1)
    assert read(store, groups.latest_answer, BOT, None, "yes") == ("no user", 0)
    assert read(store, groups.latest_answer, BOT, "ann", "Yes") is None


def test_unlabelled_leaves_out_labelled_abandoned_young_and_other_groups(store: Store) -> None:
    gone = (Completion("a", version=0), Completion("", finish_reason=FinishReason.ABANDONED))
    put_groups(
        store,
        a_group("second", 2),
        a_group("first", 1),
        a_group("picked", 1),
        a_group("abandoned", 1, completions=gone),
        a_group("streaming", 1, answers=()),
        a_group("young", 9),
        a_group("gate", 1, pool=Pool.GATE),
        a_group("duel", 1, kind=GroupKind.HELDOUT),
        a_group("other", 1, policy="x"),
    )
    put_picks(store, a_pick("picked"))

    def found(pool: Pool | None = Pool.TRAIN, limit: int = 10) -> list[str]:
        kinds = [GroupKind.TRAIN]
        rows = read(store, groups.unlabelled, BOT, pool=pool, before=minutes(5), limit=limit, kinds=kinds)
        return [group.group_id for group in rows]

    assert found() == ["first", "second"]
    assert found(limit=1) == ["first"]
    assert found(pool=None) == ["first", "gate", "second"]


def test_recent_prompts_are_the_newest_distinct_ones(store: Store) -> None:
    def asked(name: str, at: float, prompt: str, **other: Any) -> Group:
        return a_group(name, at, prompt=(Message("user", prompt),), **other)

    put_groups(
        store,
        asked("a1", 1, "a"),
        asked("b1", 2, "b"),
        asked("a2", 3, "a"),
        asked("c1", 4, "c", pool=Pool.GATE),
        asked("d1", 0, "d"),
    )
    newest = read(store, groups.recent_prompts, BOT, pool=Pool.TRAIN, limit=2)
    assert [group.group_id for group in newest] == ["a2", "b1"]
    assert len(read(store, groups.recent_prompts, BOT, pool=Pool.TRAIN, limit=9)) == 3
    assert read(store, groups.recent_prompts, BOT, pool=Pool.TRAIN, limit=0) == []


def test_more_groups_than_one_query_takes_ids(store: Store) -> None:
    many = [a_group(f"g{n:04}", n) for n in range(1100)]
    put_groups(store, *many)
    for future in [store.submit(partial(feedback.insert, row=a_pick(group.group_id))) for group in many]:
        future.result()
    rows, seq = read(store, feedback.labelled_since, BOT, after_seq=0, kinds=[GroupKind.TRAIN])
    assert [row.group for row in rows] == many
    assert all(len(row.feedback) == 1 for row in rows)
    assert seq == 1100


def test_a_replay_changes_nothing_and_another_body_is_a_conflict(store: Store) -> None:
    put_groups(store, a_group("g"))
    pick = a_pick("g", value=True)
    assert store.write(lambda c: feedback.insert(c, pick)) == (pick, False)
    replay = dataclasses.replace(pick, created_at=minutes(5))
    assert store.write(lambda c: feedback.insert(c, replay)) == (pick, True)
    changes: list[dict[str, Any]] = [
        {"label": Label.B},
        {"rater_id": "bob"},
        {"value": 1.0},
        {"tags": {"a": "b"}},
        {"choice_index": 0},
    ]
    for other in changes:
        changed = dataclasses.replace(pick, **other)
        with pytest.raises(ConflictError, match="another body"):
            store.write(partial(feedback.insert, row=changed))
    assert read(store, feedback.history, "g") == [pick]


def test_a_later_pick_revises_the_earlier_and_both_stay(store: Store) -> None:
    put_groups(store, a_group("g"))
    first, other, again, same = put_picks(
        store, a_pick("g"), a_pick("g", "bob"), a_pick("g", label=Label.B), a_pick("g", label=Label.B)
    )
    assert [row.revision for row in (first, other, again, same)] == [0, 0, 1, 2]
    assert read(store, feedback.for_group, "g") == [other, same]
    assert read(store, feedback.history, "g") == [first, other, again, same]


def test_other_metrics_and_choices_are_no_revisions(store: Store) -> None:
    put_groups(store, a_group("g"), a_group("h"))
    rows = put_picks(
        store,
        a_pick("g"),
        a_pick("g", metric="thumbs", choice_index=0, value=True),
        a_pick("g", metric="thumbs", choice_index=1, value=False),
        a_pick("h"),
    )
    assert [row.revision for row in rows] == [0, 0, 0, 0]
    assert read(store, feedback.for_group, "g") == rows[:3]


def test_feedback_needs_a_group_and_a_finite_value(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no group nobody") as unknown:
        put_picks(store, a_pick("nobody"))
    assert unknown.value.param == "group_id"
    put_groups(store, a_group("g"))
    with pytest.raises(InvalidRequestError, match="finite"):
        put_picks(store, a_pick("g", value=float("nan")))


def test_labelled_since_gives_new_groups_with_all_that_counts(store: Store) -> None:
    put_groups(store, a_group("b", 2), a_group("a", 1), a_group("c", 3), a_group("d", 0, kind=GroupKind.HELDOUT))
    put_groups(store, a_group("x", policy="other"))
    old = put_picks(store, a_pick("a"), a_pick("c"), a_pick("a", "bob"))
    seq = read(store, feedback.max_seq, BOT)
    assert seq == 3
    kinds = [GroupKind.TRAIN]
    assert read(store, feedback.labelled_since, BOT, after_seq=seq, kinds=kinds) == ([], seq)
    new = put_picks(store, a_pick("b"), a_pick("a", label=Label.TIE), a_pick("d"), a_pick("x"))
    rows, highest = read(store, feedback.labelled_since, BOT, after_seq=seq, kinds=kinds)
    expected = [
        LabelledGroup(read(store, groups.get, "a"), (old[2], new[1]), earlier=frozenset({old[2].feedback_id})),
        LabelledGroup(read(store, groups.get, "b"), (new[0],)),
    ]
    assert rows == expected
    assert highest == 6
    assert read(store, feedback.max_seq, "other") == 7
    assert read(store, feedback.max_seq, "nobody") == 0
    assert [row.feedback_id for row in read(store, feedback.recent, BOT, 2)] == [new[2].feedback_id, new[1].feedback_id]


def test_what_a_rater_only_says_again_is_not_new(store: Store) -> None:
    put_groups(store, a_group("again"), a_group("changed"), a_group("back"))
    put_picks(store, a_pick("back", label=Label.A))
    put_picks(store, a_pick("again"), a_pick("changed"), a_pick("back", label=Label.B))
    seq = read(store, feedback.max_seq, BOT)
    last = put_picks(store, a_pick("again", latency_ms=9), a_pick("changed", label=Label.B), a_pick("back", label=Label.A))
    rows, _ = read(store, feedback.labelled_since, BOT, after_seq=seq, kinds=[GroupKind.TRAIN])
    assert {row.group.group_id: row.feedback for row in rows} == {row.group_id: (row,) for row in last}
    assert {row.group.group_id: len(row.earlier) for row in rows} == {"again": 1, "changed": 0, "back": 0}


def test_count_new_picks_counts_decisive_picks_that_still_count(store: Store) -> None:
    put_groups(store, *(a_group(f"g{n}") for n in range(4)), a_group("gate", pool=Pool.GATE))
    put_picks(store, a_pick("g0"))
    seq = read(store, feedback.max_seq, BOT)
    put_picks(
        store,
        a_pick("g1"),
        a_pick("g2", label=Label.TIE),
        a_pick("g3"),
        a_pick("g3", label=Label.SKIP),  # taken back
        a_pick("g0", label=Label.B),  # revised
        a_pick("g1", metric="thumbs", label=None, value=True, choice_index=0),
        a_pick("gate"),
    )
    assert read(store, feedback.count_new_picks, BOT, after_seq=seq, pool=Pool.TRAIN) == 2
    assert read(store, feedback.count_new_picks, BOT, after_seq=seq, pool=Pool.GATE) == 1
    assert read(store, feedback.count_new_picks, BOT, after_seq=0, pool=Pool.TRAIN) == 2
