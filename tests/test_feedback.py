"""Feedback on stored groups: labels, refusals with the field's name, replays, revisions, edits, unblinding."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.server import POLICY, World, user_of

from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.loop.feedback import (
    MetricValue,
    Outcome,
    Pick,
    Recorded,
    is_revealed,
    record_metric,
    record_preference,
)
from pairloop.loop.gate import votes
from pairloop.loop.pairs import PairRules, compile_pairs
from pairloop.loop.serve import ChatRequest, ChatService, pool_of
from pairloop.store import duels, feedback
from pairloop.types import Feedback, Group, GroupKind, Label, Message, Pool, Source

CHOSEN, TIE, BOTH_BAD, SKIP = Outcome.CHOSEN, Outcome.TIE, Outcome.BOTH_BAD, Outcome.SKIP


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path / "world") as world:
        yield world


def answered(world: World, n: int = 2, user: str | None = None) -> Group:
    chat = ChatService(world.store, world.policy, world.config)
    request = ChatRequest(POLICY, (Message("user", "Where is my order?"),), n=n, user=user or user_of(Pool.TRAIN))
    return asyncio.run(chat.answer(request)).group


def pick(world: World, group: Group, **fields: Any) -> Recorded:
    return record_preference(world.store, Pick(group.group_id, **fields))


def rows(world: World, group: Group, *, history: bool = False) -> list[Feedback]:
    with world.store.reading() as c:
        return feedback.history(c, group.group_id) if history else feedback.for_group(c, group.group_id)


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"outcome": CHOSEN, "chosen_index": 0}, Label.A),
        ({"outcome": CHOSEN, "chosen_index": 1, "rejected_index": 0}, Label.B),
        ({"chosen_index": 1}, Label.B),
        ({"outcome": TIE}, Label.TIE),
        ({"outcome": BOTH_BAD}, Label.BOTH_BAD),
        ({"outcome": SKIP}, Label.SKIP),
    ],
)
def test_outcomes_become_labels(world: World, fields: dict[str, Any], label: Label) -> None:
    group = answered(world)
    assert pick(world, group, **fields).feedback.label is label
    assert [row.label for row in rows(world, group)] == [label]


def test_a_pick_keeps_all_that_was_said(world: World) -> None:
    group = answered(world)
    said = pick(
        world,
        group,
        chosen_index=1,
        shown_order=(1, 0),
        reason="it names the order",
        rater_id="rita",
        latency_ms=5_400,
        source=Source.LLM,
        tags={"shop": "one"},
        feedback_id="my-id",
    ).feedback
    assert (said.feedback_id, said.group_id, said.rater_id, said.source) == ("my-id", group.group_id, "rita", Source.LLM)
    assert (said.shown_order, said.text, said.latency_ms, said.tags) == ((1, 0), "it names the order", 5_400, {"shop": "one"})
    assert rows(world, group) == [said]


def test_the_rater_is_the_groups_user_unless_named(world: World) -> None:
    known, group = user_of(Pool.TRAIN), answered(world)
    assert pick(world, group, chosen_index=0).feedback.rater_id == known
    assert pick(world, group, chosen_index=0, rater_id="rita").feedback.rater_id == "rita"


def asked_by_nobody(world: World, **metadata: str) -> Group:
    request = ChatRequest(POLICY, (Message("user", "hello"),), n=2, metadata=metadata)
    return asyncio.run(ChatService(world.store, world.policy, world.config).answer(request)).group


def test_without_a_name_the_conversation_is_the_rater(world: World) -> None:
    opening = asked_by_nobody(world)
    further, stranger = asked_by_nobody(world, parent=opening.group_id), asked_by_nobody(world)
    named = [asked_by_nobody(world, conversation_id="talk-1") for _ in range(2)]
    raters = [pick(world, group, chosen_index=0).feedback.rater_id for group in (opening, further, stranger, *named)]
    mine, theirs = (f"conversation:{group.group_id}" for group in (opening, stranger))
    assert raters == [mine, mine, theirs, "conversation:talk-1", "conversation:talk-1"]
    value = MetricValue(stranger.group_id, "thumbs", True, choice_index=0)
    assert record_metric(world.store, value).feedback.rater_id == theirs


def test_nameless_raters_are_many_to_caps_and_gate(world: World) -> None:
    for pool in Pool:
        if pool is Pool.GATE:
            world.add_version(1)
            world.open_duel(1)
        opening = next(text for text in map(str, range(100)) if pool_of(f"user\0{text}", 0.2) is pool)
        request = ChatRequest(POLICY, (Message("user", opening),), n=2)
        chat = ChatService(world.store, world.policy, world.config)
        for _ in range(5):
            pick(world, asyncio.run(chat.answer(request)).group, chosen_index=0, latency_ms=4_000)
    with world.store.reading() as c:
        duel = duels.current(c, POLICY)
        assert duel is not None
        cast = votes(duel, duels.picks(c, duel.duel_id))
        trained, _ = feedback.labelled_since(c, POLICY, after_seq=0, kinds=[GroupKind.TRAIN])
    assert len(cast) == len({vote.rater_id for vote in cast}) == 5
    rules = replace(PairRules.of(world.config), max_picks_per_rater=1)
    assert "rater_cap" not in compile_pairs(trained, rules).dropped


def test_a_duels_vote_stays_as_it_was_before_the_versions_were_told(world: World) -> None:
    world.add_version(1)
    world.open_duel(1)
    group = answered(world, user=user_of(Pool.GATE))
    blind = pick(world, group, chosen_index=0)
    assert blind.versions is not None
    assert pick(world, group, chosen_index=1).feedback.revision == 1
    assert pick(world, group, outcome=SKIP).feedback.revision == 2
    assert [row.label for row in rows(world, group, history=True)] == [Label.A, Label.B, Label.SKIP]
    with world.store.reading() as c:
        duel = duels.current(c, POLICY)
        assert duel is not None
        (vote,) = votes(duel, duels.picks(c, duel.duel_id))
        assert is_revealed(c, group)
    assert vote.outcome == (1 if blind.versions[0] == duel.challenger else -1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chosen_index": 7}, "chosen_index"),
        ({"chosen_index": -1}, "chosen_index"),
        ({"chosen_index": 0, "rejected_index": 7}, "rejected_index"),
        ({"chosen_index": 0, "rejected_index": 0}, "rejected_index"),
        ({"outcome": CHOSEN}, "chosen_index"),
        ({"outcome": TIE, "chosen_index": 0}, "chosen_index"),
        ({"outcome": SKIP, "rejected_index": 0}, "rejected_index"),
        ({}, "outcome"),
        ({"chosen_index": 0, "shown_order": (0, 0)}, "shown_order"),
        ({"chosen_index": 0, "shown_order": (1,)}, "shown_order"),
        ({"chosen_index": 0, "edited_text": "  "}, "edited_text"),
    ],
)
def test_a_pick_that_cannot_be_right_is_refused_with_its_field(world: World, fields: dict[str, Any], param: str) -> None:
    group = answered(world)
    with pytest.raises(InvalidRequestError) as refused:
        pick(world, group, **fields)
    assert refused.value.param == param
    assert rows(world, group) == []


def test_unknown_abandoned_and_single_groups_take_no_pick(world: World) -> None:
    with pytest.raises(NotFoundError, match="no inference") as unknown:
        record_preference(world.store, Pick("chatcmpl-nobody", chosen_index=0))
    assert unknown.value.param == "inference_id"
    with pytest.raises(InvalidRequestError, match="has 1") as single:
        pick(world, answered(world, n=1), chosen_index=0)
    assert single.value.param == "inference_id"

    async def walk_away() -> Group:
        chat = ChatService(world.store, world.policy, world.config)
        stream = await chat.stream(ChatRequest(POLICY, (Message("user", "hello"),), n=2))
        with pytest.raises(ConflictError, match="never answered to its end"):
            record_preference(world.store, Pick(stream.group.group_id, chosen_index=0))
        stream.abandon()
        return stream.group

    with pytest.raises(ConflictError, match="never answered to its end"):
        pick(world, asyncio.run(walk_away()), chosen_index=0)


def test_a_replay_changes_nothing_and_another_body_conflicts(world: World) -> None:
    group = answered(world)
    first = pick(world, group, chosen_index=1, feedback_id="one", latency_ms=2_000)
    again = pick(world, group, chosen_index=1, feedback_id="one", latency_ms=2_000)
    assert (first.duplicate, again.duplicate) == (False, True)
    assert again.feedback == first.feedback
    with pytest.raises(ConflictError):
        pick(world, group, chosen_index=0, feedback_id="one", latency_ms=2_000)
    assert rows(world, group, history=True) == [first.feedback]


def test_a_second_pick_revises_the_first_and_history_stays(world: World) -> None:
    group = answered(world)
    pick(world, group, chosen_index=0, rater_id="rita")
    second = pick(world, group, chosen_index=1, rater_id="rita").feedback
    other = pick(world, group, outcome=TIE, rater_id="olaf").feedback
    assert second.revision == 1
    assert rows(world, group) == [second, other]
    assert len(rows(world, group, history=True)) == 3


def test_an_edit_is_a_demonstration_beside_the_pick(world: World) -> None:
    group = answered(world)
    fields: dict[str, Any] = {"chosen_index": 1, "edited_text": "the ideal answer", "feedback_id": "one"}
    pick(world, group, **fields)
    preference, demonstration = rows(world, group)
    assert (preference.metric, preference.label) == ("preference", Label.B)
    assert (demonstration.metric, demonstration.value, demonstration.choice_index) == ("demonstration", "the ideal answer", 1)
    assert pick(world, group, **fields).duplicate
    for other in ({**fields, "edited_text": "something else"}, {**fields, "edited_text": None}):
        with pytest.raises(ConflictError):
            pick(world, group, **other)
    pick(world, group, chosen_index=1, feedback_id="two")
    with pytest.raises(ConflictError, match="edited_text"):
        pick(world, group, chosen_index=1, feedback_id="two", edited_text="added later")
    assert len(rows(world, group, history=True)) == 3


def test_a_dry_run_checks_and_writes_nothing(world: World) -> None:
    group, told = answered(world), threading.Event()
    tried = record_preference(world.store, Pick(group.group_id, chosen_index=0), notify=told.set, dryrun=True)
    assert tried.dryrun
    assert not tried.duplicate
    assert tried.feedback.label is Label.A
    with pytest.raises(InvalidRequestError):
        record_preference(world.store, Pick(group.group_id, chosen_index=7), dryrun=True)
    assert rows(world, group, history=True) == []
    assert not told.is_set()


def test_the_scheduler_is_told_of_new_rows_only(world: World) -> None:
    group, told = answered(world), []
    for _ in range(2):
        record_preference(world.store, Pick(group.group_id, chosen_index=0, feedback_id="one"), notify=lambda: told.append(1))
    assert len(told) == 1


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("thumbs", True),
        ("thumbs", False),
        ("score", 0.75),
        ("score", 3),
        ("comment", "nice"),
        ("demonstration", "ideal"),
        ("csat", 4),
    ],
)
def test_values_are_stored_as_they_were_said(world: World, metric: str, value: bool | float | str) -> None:
    group = answered(world)
    said = record_metric(world.store, MetricValue(group.group_id, metric, value, choice_index=1, comment="why")).feedback
    assert (said.metric, said.value, said.choice_index, said.text) == (metric, value, 1, "why")
    assert type(rows(world, group)[0].value) is type(value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metric": "thumbs", "value": 1.0, "choice_index": 0}, "value"),
        ({"metric": "score", "value": True, "choice_index": 0}, "value"),
        ({"metric": "score", "value": "good", "choice_index": 0}, "value"),
        ({"metric": "score", "value": float("inf"), "choice_index": 0}, "value"),
        ({"metric": "comment", "value": " ", "choice_index": 0}, "value"),
        ({"metric": "demonstration", "value": 3.0, "choice_index": 0}, "value"),
        ({"metric": "preference", "value": True, "choice_index": 0}, "metric_name"),
        ({"metric": "thumbs", "value": True, "choice_index": 7}, "choice_index"),
        ({"metric": "thumbs", "value": True}, "choice_index"),
    ],
)
def test_values_that_cannot_be_right_are_refused_with_their_field(world: World, fields: dict[str, Any], param: str) -> None:
    group = answered(world)
    with pytest.raises(InvalidRequestError) as refused:
        record_metric(world.store, MetricValue(group.group_id, **fields))
    assert refused.value.param == param
    assert rows(world, group) == []


def test_the_index_may_be_left_out_where_only_one_is_meant(world: World) -> None:
    single, pair = answered(world, n=1), answered(world)
    assert record_metric(world.store, MetricValue(single.group_id, "thumbs", True)).feedback.choice_index == 0
    assert record_metric(world.store, MetricValue(pair.group_id, "demonstration", "ideal")).feedback.choice_index is None


def test_a_duel_is_unblinded_by_a_pick_and_by_nothing_else(world: World) -> None:
    world.add_version(1)
    world.open_duel(1)
    group = answered(world, user=user_of(Pool.GATE))
    assert group.kind is GroupKind.DUEL

    def revealed() -> bool:
        with world.store.reading() as c:
            return is_revealed(c, group)

    assert record_preference(world.store, Pick(group.group_id, chosen_index=0), dryrun=True).versions is None
    assert record_metric(world.store, MetricValue(group.group_id, "thumbs", True, choice_index=0)).versions is None
    assert pick(world, group, outcome=SKIP).versions is None
    assert not revealed()
    assert pick(world, group, chosen_index=1).versions == tuple(completion.version for completion in group.completions)
    assert revealed()


def test_outside_a_duel_the_versions_are_no_secret(world: World) -> None:
    group = answered(world)
    assert pick(world, group, outcome=SKIP).versions == (0, 0)
