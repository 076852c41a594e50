"""The label stage: verifiers and judges fill in where nobody picked, and their failures are counted, not guessed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.judge_server import judge_server, longer_wins

from pairloop.config import Config
from pairloop.errors import ConfigError
from pairloop.loop import label, pairs
from pairloop.store import Store, feedback, groups
from pairloop.types import (
    Completion,
    Feedback,
    FinishReason,
    Group,
    GroupKind,
    Label,
    Message,
    Pool,
    Source,
)

POLICY = "support-bot"


def length_score(messages: list[dict[str, str]], completion: str) -> float:
    """A verifier: the longer the better; it cannot judge what says boom."""
    if "boom" in completion:
        raise RuntimeError("cannot judge this")
    return float(len(completion) + 0 * len(messages))


def put(
    store: Store, *texts: str, group_id: str, pool: Pool = Pool.TRAIN, kind: GroupKind = GroupKind.TRAIN, age_s: float = 60
) -> None:
    ended = FinishReason.ABANDONED if "gone" in texts else FinishReason.STOP
    completions = tuple(Completion(text, (1,), (-0.5,), 0, ended) for text in texts)
    made_at = datetime.now(UTC) - timedelta(seconds=age_s)
    group = Group(group_id, POLICY, kind, pool, (Message("user", f"question of {group_id}"),), completions, made_at)
    store.write(lambda c: groups.insert(c, group))


def rows_of(store: Store, group_id: str) -> list[Feedback]:
    with store.reading() as c:
        return feedback.for_group(c, group_id)


def configured(**label_section: Any) -> Config:
    return Config.model_validate({"label": label_section})


VERIFIER = f"{__name__}:length_score"


def test_without_a_labeller_nothing_happens(store: Store) -> None:
    put(store, "a", "bb", group_id="g")
    assert label.run(store, Config()) == label.LabelRecord()
    assert rows_of(store, "g") == []


def test_a_verifier_scores_every_completion_of_both_pools(store: Store) -> None:
    put(store, "a", "bbb", "cc", group_id="train")
    put(store, "a", "bb", group_id="gate", pool=Pool.GATE, kind=GroupKind.HELDOUT)

    record = label.run(store, configured(verifier=VERIFIER))

    assert (record.labelled, record.errors, record.labeller) == (2, 0, VERIFIER)
    rows = rows_of(store, "train")
    assert [(row.metric, row.choice_index, row.value) for row in rows] == [
        ("score", 0, 1.0),
        ("score", 1, 3.0),
        ("score", 2, 2.0),
    ]
    assert {(row.source, row.rater_id) for row in rows} == {(Source.CODE, VERIFIER)}
    assert len(rows_of(store, "gate")) == 2
    assert label.run(store, configured(verifier=VERIFIER)).labelled == 0
    dataset = pairs.run(store, None, Config(), cycle_id=None, parent=0)
    assert dataset is not None
    assert (dataset.n_train, dataset.n_heldout) == (3, 1)


def test_only_groups_that_are_old_enough_and_that_nobody_judged_are_labelled(store: Store) -> None:
    put(store, "a", "bb", group_id="young", age_s=5)
    put(store, "a", "bb", group_id="old")
    put(store, "a", "gone", group_id="abandoned")
    put(store, "a", group_id="single")
    put(store, "a", "bb", group_id="picked")
    pick = Feedback("f1", "picked", "preference", Source.HUMAN, "ann", datetime.now(UTC), label=Label.A)
    store.write(lambda c: feedback.insert(c, pick))

    assert label.run(store, configured(verifier=VERIFIER, after="30s")).labelled == 1

    labelled = {name: len(rows_of(store, name)) for name in ("young", "old", "abandoned", "single", "picked")}
    assert labelled == {"young": 0, "old": 2, "abandoned": 0, "single": 0, "picked": 1}


def test_a_verifier_that_raises_is_an_error_with_its_reason_and_no_feedback(store: Store) -> None:
    put(store, "boom", "bb", group_id="bad")
    put(store, "a", "bb", group_id="good")
    record = label.run(store, configured(verifier=VERIFIER))
    assert (record.labelled, record.errors) == (1, 1)
    ((reason, count),) = record.reasons.items()
    assert (reason.rpartition(":")[0], count) == (f"verifier {VERIFIER} raised RuntimeError (test_label.py", 1)
    assert rows_of(store, "bad") == []
    with pytest.raises(ConfigError, match="cannot be imported"):
        label.run(store, configured(verifier="no_such_module:score"))


def test_a_judge_picks_ties_where_its_orders_disagree_and_is_silent_where_it_fails(store: Store) -> None:
    put(store, "short", "much longer", group_id="clear")
    put(store, "flip", "side", group_id="flipped")
    put(store, "error", "other", group_id="failed")
    put(store, "a", "b", "c", group_id="three")

    def reply(a: str, b: str) -> str:
        if "error" in (a, b):
            return "no idea"
        return "[[A]]" if "flip" in (a, b) else longer_wins(a, b)

    with judge_server(reply) as (url, _):
        record = label.run(store, configured(judge_url=url, judge_model="judge-1"))

    assert (record.labelled, record.errors, record.skipped, record.flipped, record.labeller) == (2, 1, 1, 1, "judge-1")
    [clear], [flipped] = rows_of(store, "clear"), rows_of(store, "flipped")
    assert (clear.label, clear.metric, clear.source, clear.rater_id) == (Label.B, "preference", Source.LLM, "judge-1")
    assert (flipped.label, flipped.tags) == (Label.TIE, {"flipped": "true"})
    assert rows_of(store, "failed") == rows_of(store, "three") == []
    assert list(record.reasons) == ["judge judge-1: no verdict in a reply of 7 characters"]


def test_a_judge_that_is_down_is_left_alone_after_a_while(store: Store) -> None:
    waiting = label.GIVE_UP_AFTER + label.BATCH + 7
    for i in range(waiting):
        put(store, "a", f"b{i}", group_id=f"g{i:04d}")
    with judge_server(longer_wins) as (url, _):
        pass
    record = label.run(store, configured(judge_url=url, judge_model="judge-1"))
    assert (record.labelled, record.errors, record.skipped) == (0, label.GIVE_UP_AFTER, label.BATCH + 7)
    assert label.run(store, configured(verifier=VERIFIER), limit=10).labelled == 10
