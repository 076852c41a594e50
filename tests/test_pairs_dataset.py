"""The snapshot that the store keeps of the pairs: what is new, what comes again, with its lineage."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.labelled_groups import NOW, POLICY, ask, pick, put, row, said, scores, statements, thumb
from tests.stores import open_store

from pairloop.config import Config
from pairloop.formats import snapshot
from pairloop.loop import pairs
from pairloop.policy.fake import FakePolicy
from pairloop.store import Store, cycles, datasets, doctor, feedback, marks, quarantines, runs, versions
from pairloop.store.quarantines import Quarantine
from pairloop.types import (
    Alias,
    Completion,
    Cycle,
    CycleState,
    CycleStep,
    Feedback,
    Group,
    GroupKind,
    Label,
    Pool,
    Run,
    RunStatus,
    Version,
    VersionKind,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "artifacts") as opened:
        base = Version(POLICY, 0, VersionKind.BASE, "base", "", None, None, None, NOW)
        opened.write(lambda c: versions.insert(c, base))
        opened.write(lambda c: versions.set_alias(c, POLICY, Alias.CHAMPION, 0))
        yield opened


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
