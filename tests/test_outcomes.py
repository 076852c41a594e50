"""Outcomes of a conversation, joined later to the answers that were taken; and a labeller's error, which is no tie."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.server import POLICY, RunningServer, World, user_of

from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.loop.feedback import (
    Applied,
    ConversationValue,
    Outcome,
    Pick,
    record_outcome,
    record_preference,
)
from pairloop.loop.gate import votes
from pairloop.loop.pairs import PairRules, compile_pairs
from pairloop.loop.serve import ChatRequest, ChatService
from pairloop.store import duels, feedback, groups, stored
from pairloop.types import Completion, Feedback, Group, GroupKind, Message, Pool, Source

TALK = "talk-1"
Serve = Callable[..., RunningServer]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path / "world") as world:
        yield world


def say(world: World, text: str = "hello", *, after: tuple[Group, int] | None = None, n: int = 2, **metadata: str) -> Group:
    """One turn of the conversation, going on from an answer where one is given."""
    chat = ChatService(world.store, world.policy, world.config)
    turns: tuple[Message, ...] = (Message("user", text),)
    if after is not None:
        group, index = after
        assert isinstance(group.prompt, tuple)
        turns = (*group.prompt, Message("assistant", group.completions[index].text), *turns)
        metadata["parent"] = group.group_id
    metadata = metadata if after else {"conversation_id": TALK, **metadata}
    return asyncio.run(chat.answer(ChatRequest(POLICY, turns, n=n, user=user_of(Pool.TRAIN), metadata=metadata))).group


def outcome(world: World, value: Any = True, **fields: Any) -> Applied:
    return record_outcome(
        world.store, ConversationValue(**{"conversation_id": TALK, "metric": "resolved", "value": value, **fields})
    )


def about(rows: tuple[Feedback, ...]) -> list[tuple[str, int | None]]:
    return [(row.group_id, row.choice_index) for row in rows]


def history(world: World, group: Group) -> list[Feedback]:
    with world.store.reading() as c:
        return feedback.history(c, group.group_id)


def test_the_taken_answers_get_the_value(world: World) -> None:
    opening = say(world)
    single = say(world, "and then?", after=(opening, 1), n=1)
    picked = say(world, "really?", after=(single, 0))
    record_preference(world.store, Pick(picked.group_id, chosen_index=0))
    undecided = say(world, "bye", after=(picked, 0))
    applied = outcome(world, rater_id="desk", tags={"via": "crm"}, comment="closed", source=Source.CODE)
    assert about(applied.rows) == [(opening.group_id, 1), (single.group_id, 0), (picked.group_id, 0)]
    assert applied.undecided == (undecided.group_id,)
    for row in applied.rows:
        assert row in history(world, world.group(row.group_id))
        assert (row.metric, row.value, row.text, row.rater_id, row.source) == ("resolved", True, "closed", "desk", Source.CODE)
        assert row.tags == {"via": "crm", "conversation_id": TALK}
    assert history(world, undecided) == []


def test_the_branch_that_went_on_beats_an_earlier_pick(world: World) -> None:
    opening = say(world)
    record_preference(world.store, Pick(opening.group_id, chosen_index=0))
    say(world, after=(opening, 1), n=1)
    assert about(outcome(world).rows)[0] == (opening.group_id, 1)


def test_a_judges_pick_is_not_a_choice_of_the_customers(world: World) -> None:
    opening = say(world)
    record_preference(world.store, Pick(opening.group_id, chosen_index=0, source=Source.LLM))
    with pytest.raises(ConflictError, match="no answer was taken yet"):
        outcome(world)


def test_conversations_are_told_apart(world: World) -> None:
    mine = say(world, n=1)
    other = say(world, n=1, conversation_id="talk-2")
    assert about(outcome(world).rows) == [(mine.group_id, 0)]
    assert history(world, other) == []
    with pytest.raises(NotFoundError) as unknown:
        outcome(world, conversation_id="talk-3")
    assert unknown.value.param == "conversation_id"


def test_the_first_replys_id_names_a_conversation_without_a_name(world: World) -> None:
    opening = say(world, n=1, conversation_id="")
    further = say(world, after=(opening, 0), n=1)
    applied = outcome(world, conversation_id=opening.group_id)
    assert about(applied.rows) == [(opening.group_id, 0), (further.group_id, 0)]


def test_a_replay_changes_nothing_though_the_conversation_went_on(world: World) -> None:
    opening = say(world, n=1)
    first = outcome(world, feedback_id="one")
    further = say(world, after=(opening, 0), n=1)
    again = outcome(world, feedback_id="one")
    assert (first.duplicate, again.duplicate) == (False, True)
    assert again.rows == first.rows
    assert history(world, further) == []
    for other in ({"value": False}, {"metric": "refunded"}, {"comment": "why"}, {"rater_id": "olaf"}, {"tags": {"a": "b"}}):
        with pytest.raises(ConflictError, match="another body"):
            outcome(world, **{"feedback_id": "one", **other})
    for value in (1, 1.0):  # equal to True in Python, and not the same thing
        with pytest.raises(ConflictError, match="another body"):
            outcome(world, value, feedback_id="one")
    assert len(history(world, opening)) == 1


def test_a_second_outcome_revises_the_first(world: World) -> None:
    opening = say(world, n=1)
    outcome(world, value=True)
    second = outcome(world, value=False)
    assert [row.revision for row in second.rows] == [1]
    with world.store.reading() as c:
        assert [row.value for row in feedback.for_group(c, opening.group_id)] == [False]


def test_a_dry_run_writes_nothing(world: World) -> None:
    opening, told = say(world, n=1), []
    value = ConversationValue(TALK, "resolved", True)
    tried = record_outcome(world.store, value, dryrun=True, notify=lambda: told.append(1))
    assert tried.dryrun
    assert about(tried.rows) == [(opening.group_id, 0)]
    assert (history(world, opening), told) == ([], [])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metric": "preference"}, "metric_name"),
        ({"metric": "demonstration", "value": "x"}, "metric_name"),
        ({"metric": "comment", "value": "x"}, "metric_name"),
        ({"metric": "error"}, "metric_name"),
        ({"metric": "thumbs", "value": 1.0}, "value"),
        ({"metric": "score", "value": "good"}, "value"),
        ({"value": float("nan")}, "value"),
    ],
)
def test_outcomes_that_cannot_be_right_are_refused(world: World, fields: dict[str, Any], param: str) -> None:
    say(world, n=1)
    with pytest.raises(InvalidRequestError) as refused:
        outcome(world, **fields)
    assert refused.value.param == param


def test_deleted_and_abandoned_answers_take_no_outcome(world: World) -> None:
    gone, kept = say(world, n=1), say(world, n=1)
    assert world.store.write(lambda c: stored.delete(c, gone.group_id, gone.created_at))
    assert about(outcome(world).rows) == [(kept.group_id, 0)]


def test_an_id_that_everybody_shares_is_no_conversation(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairloop.loop.feedback.outcomes.MAX_ANSWERS", 2)
    for _ in range(3):
        say(world, n=1)
    with pytest.raises(InvalidRequestError, match="more than 2 answers"):
        outcome(world)


def trained(world: World, metrics: tuple[str, ...]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    with world.store.reading() as c:
        labelled, _ = feedback.labelled_since(c, POLICY, after_seq=0, kinds=[GroupKind.TRAIN])
    compiled = compile_pairs(labelled, PairRules(thumb_metrics=metrics))
    return [(pair.chosen.text, pair.rejected.text) for pair in compiled.pairs], compiled.dropped


def test_a_resolved_and_an_unresolved_conversation_make_a_pair(world: World) -> None:
    for name, value in (("good", True), ("bad", False)):
        group = say(world, n=1, conversation_id=name)
        moved = Completion(name, version=0)  # two answers of different text, whatever the fake policy said
        fresh = replace(group, group_id=f"chatcmpl-{name}", completions=(moved,))
        world.store.write(partial(groups.insert, group=fresh))
        outcome(world, value, conversation_id=name)
    configured = world.config.feedback.thumb_metrics
    pairs, _ = trained(world, configured)
    assert ("good", "bad") in pairs
    assert trained(world, ()) == ([], {"other_metric": 4}), "a metric that is not configured is kept, with its reason"


# --- a labeller's error


def test_an_error_is_kept_and_never_a_tie(world: World) -> None:
    group = say(world)
    failed = record_preference(
        world.store, Pick(group.group_id, Outcome.ERROR, reason="the judge timed out", source=Source.LLM, rater_id="judge")
    )
    assert (failed.feedback.metric, failed.feedback.label, failed.feedback.text) == ("error", None, "the judge timed out")
    assert trained(world, ()) == ([], {"judge_error": 1})
    later = record_preference(world.store, Pick(group.group_id, chosen_index=1, source=Source.LLM, rater_id="judge"))
    assert later.feedback.revision == 0, "the judge's later pick revises nothing"
    pairs, dropped = trained(world, ())
    assert (len(pairs), dropped) == (1, {"judge_error": 1})


def test_an_error_casts_no_vote_in_a_duel(world: World) -> None:
    world.add_version(1)
    duel = world.open_duel(1)
    chat = ChatService(world.store, world.policy, world.config)
    request = ChatRequest(POLICY, (Message("user", "hello"),), n=2, user=user_of(Pool.GATE))
    group = asyncio.run(chat.answer(request)).group

    def cast() -> int:
        with world.store.reading() as c:
            return len(votes(duel, duels.picks(c, duel.duel_id)))

    failed = record_preference(world.store, Pick(group.group_id, Outcome.ERROR, source=Source.CODE, rater_id="judge"))
    assert failed.versions is None, "an error unblinds nothing"
    assert cast() == 0
    record_preference(world.store, Pick(group.group_id, Outcome.TIE, source=Source.LLM, rater_id="judge"))
    assert cast() == 1, "a tie is a vote, an error is none"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"source": Source.HUMAN}, "outcome"),
        ({"chosen_index": 0}, "chosen_index"),
        ({"edited_text": "better"}, "edited_text"),
    ],
)
def test_errors_that_cannot_be_right_are_refused(world: World, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        record_preference(
            world.store, Pick(**{"inference_id": say(world).group_id, "outcome": Outcome.ERROR, "source": Source.LLM, **fields})
        )
    assert refused.value.param == param


# --- over HTTP


def test_an_outcome_over_http(serve: Serve) -> None:
    server = serve()
    opening = server.chat(n=1, metadata={"conversation_id": TALK}).json()["id"]
    open_pair = server.chat(n=2, metadata={"conversation_id": TALK}).json()["id"]
    body = {
        "id": "case-7",
        "conversation_id": TALK,
        "metric_name": "resolved",
        "value": True,
        "source": "code",
        "source_id": "crm",
    }
    assert server.http.post("/v1/feedback", json={**body, "dryrun": True}).json()["dryrun"] is True
    said = server.http.post("/v1/feedback", json=body)
    assert said.status_code == 201
    assert said.json() == {
        "feedback_id": "case-7",
        "conversation_id": TALK,
        "duplicate": False,
        "applied": [{"feedback_id": "case-7", "inference_id": opening, "choice_index": 0, "revision": 0}],
        "undecided": [open_pair],
    }
    again = server.http.post("/v1/feedback", json=body)
    assert (again.status_code, again.json()["duplicate"]) == (200, True)
    assert server.http.post("/v1/feedback", json={**body, "value": False}).status_code == 409
    assert server.http.post("/v1/feedback", json={**body, "id": None, "conversation_id": "who"}).status_code == 404
    for fields, param in (
        ({"inference_id": opening}, "inference_id"),
        ({"conversation_id": None}, "inference_id"),
        ({"choice_index": 0}, "choice_index"),
        ({"conversation_id": "x" * 513}, "conversation_id"),
    ):
        refused = server.http.post("/v1/feedback", json={**body, **fields})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param
    failed = {"inference_id": open_pair, "outcome": "error", "source": "llm", "reason": "no answer"}
    assert server.http.post("/v1/preferences", json=failed).status_code == 201
    assert server.http.post("/v1/preferences", json={**failed, "source": "human"}).json()["error"]["param"] == "outcome"
    assert 'pairloop_picks_total{label="error"} 1.0' in server.http.get("/metrics").text
