"""Deciding who answers: pools, kinds, duels, predecessors, explicit versions, and what is loaded and evicted."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from tests.server import POLICY, World, as_stored, fake_config, user_of

from pairloop.errors import EngineError, InvalidRequestError, NotFoundError
from pairloop.loop.serve import AnswerStream, ChatRequest, ChatService, pool_of
from pairloop.loop.serve.stopwatch import Took
from pairloop.loop.serve.stream import Lockstep
from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import SampleRequest, TokenEvent
from pairloop.types import Alias, Completion, CycleState, FinishReason, Group, GroupKind, Message, Pool, SamplingParams

ASK = (Message("user", "Where is my order?"),)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path / "world") as world:
        yield world


def request(**fields: Any) -> ChatRequest:
    return ChatRequest(**{"model": POLICY, "messages": ASK, **fields})


def service(world: World, seed: int = 0) -> ChatService:
    return ChatService(world.store, world.policy, world.config, rng=random.Random(seed))


def answer(world: World, seed: int = 0, **fields: Any) -> Group:
    """The group that answers one request, as it was stored."""
    group = asyncio.run(service(world, seed).answer(request(**fields))).group
    assert world.group(group.group_id) == as_stored(group)
    return group


def test_the_pool_is_a_stable_share_of_the_raters() -> None:
    share = sum(pool_of(f"user-{i}", 0.2) is Pool.GATE for i in range(5_000)) / 5_000
    assert 0.18 < share < 0.22
    assert all(pool_of(f"user-{i}", 0.0) is Pool.TRAIN for i in range(100))
    assert all(pool_of(f"user-{i}", 1.0) is Pool.GATE for i in range(100))
    # A rater of the smaller gate pool stays in the larger one.
    assert all(pool_of(f"u{i}", 0.5) is Pool.GATE for i in range(500) if pool_of(f"u{i}", 0.1) is Pool.GATE)


def test_a_group_holds_what_was_sampled_and_is_stored_before_it_is_answered(world: World) -> None:
    group = answer(world, n=2, user=user_of(Pool.TRAIN), params=SamplingParams(temperature=0.5), metadata={"shop": "one"})
    assert (group.kind, group.pool, group.policy) == (GroupKind.TRAIN, Pool.TRAIN, POLICY)
    assert len(group.completions) == 2
    assert group.prompt_token_ids == world.policy.tokens.encode_prompt(ASK)
    assert group.sampling == SamplingParams(max_tokens=world.config.serve.max_tokens, temperature=0.5)
    assert group.metadata == {"shop": "one"}
    for completion in group.completions:
        assert completion.version == 0
        assert len(completion.token_ids) == len(completion.logps) > 0
        assert completion.finish_reason is FinishReason.STOP


def test_pools_are_fixed_by_user_then_by_conversation(world: World) -> None:
    assert answer(world, n=2, user=user_of(Pool.GATE)).kind is GroupKind.HELDOUT
    assert answer(world, n=2, user=user_of(Pool.TRAIN)).kind is GroupKind.TRAIN
    named = answer(world, metadata={"conversation_id": user_of(Pool.GATE)})
    assert (named.pool, named.conversation_id) == (Pool.GATE, user_of(Pool.GATE))
    # Without user or conversation, the opening turn decides: the same for all that begin alike, and for later turns.
    first = answer(world)
    opening = (*ASK, Message("assistant", "any answer"), Message("user", "and then?"))
    assert answer(world).pool is answer(world, messages=opening).pool is first.pool


def test_the_client_that_did_not_opt_in_never_gets_two(world: World) -> None:
    user = user_of(Pool.TRAIN)
    assert len(answer(world, user=user).completions) == 1
    assert len(answer(world, user=user, pair_allowed=True).completions) == 2
    assert len(answer(world, user=user, pair_allowed=True, n=3).completions) == 3


def test_the_exposure_rate_is_the_share_of_opted_in_requests_that_get_two(tmp_path: Path) -> None:
    config = fake_config(tmp_path, serve={"exposure_rate": 0.3})
    with World(tmp_path / "world", config=config) as world:
        chat = service(world)

        async def sizes() -> Counter[int]:
            plans = [await chat.plan(request(pair_allowed=True)) for _ in range(300)]
            return Counter(len(plan.versions) for plan in plans)

        counts = asyncio.run(sizes())
        assert 60 < counts[2] < 120
        assert len(answer(world, n=2).completions) == 2  # asked for, so not a matter of exposure


def test_only_the_gate_pool_duels_and_a_fair_coin_places_the_challenger(world: World) -> None:
    world.add_version(1)
    duel = world.open_duel(1)
    chat = service(world)

    async def plans(user: str, n: int, count: int) -> list[tuple[GroupKind, tuple[int, ...], str | None]]:
        found = [await chat.plan(request(user=user, n=n)) for _ in range(count)]
        return [(plan.group.kind, plan.versions, plan.group.duel_id) for plan in found]

    duels = asyncio.run(plans(user_of(Pool.GATE), 2, 400))
    assert {(kind, duel_id) for kind, _, duel_id in duels} == {(GroupKind.DUEL, duel.duel_id)}
    sides = Counter(versions for _, versions, _ in duels)
    assert set(sides) == {(0, 1), (1, 0)}
    assert 160 < sides[0, 1] < 240
    assert set(asyncio.run(plans(user_of(Pool.TRAIN), 2, 20))) == {(GroupKind.TRAIN, (0, 0), None)}
    assert set(asyncio.run(plans(user_of(Pool.GATE), 1, 20))) == {(GroupKind.HELDOUT, (0,), None)}
    assert set(asyncio.run(plans(user_of(Pool.GATE), 3, 20))) == {(GroupKind.HELDOUT, (0, 0, 0), None)}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=0),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1e-46),
        SamplingParams(temperature=0.3),
        SamplingParams(top_p=1e-6),
        SamplingParams(temperature=0.7, seed=7),
    ],
)
def test_a_request_that_could_be_repeated_at_the_champion_never_duels(world: World, params: SamplingParams) -> None:
    world.add_version(1)
    world.open_duel(1)
    group = answer(world, n=2, user=user_of(Pool.GATE), params=params)
    assert (group.kind, group.pool, group.duel_id) == (GroupKind.HELDOUT, Pool.GATE, None)
    assert [completion.version for completion in group.completions] == [0, 0]
    sampled = replace(params, seed=None, temperature=0.7, top_p=0.9)
    assert answer(world, n=2, user=user_of(Pool.GATE), params=sampled).kind is GroupKind.DUEL


def test_a_duel_group_holds_one_answer_of_each(world: World) -> None:
    world.add_version(1)
    duel = world.open_duel(1)
    group = answer(world, n=2, user=user_of(Pool.GATE))
    assert group.duel_id == duel.duel_id
    assert sorted(completion.version or 0 for completion in group.completions) == [0, 1]


def test_the_duel_share_leaves_the_rest_to_the_champion(tmp_path: Path) -> None:
    config = fake_config(tmp_path, serve={"duel_share": 0.5})
    with World(tmp_path / "world", config=config) as world:
        world.add_version(1)
        world.open_duel(1)
        chat = service(world)

        async def kinds() -> Counter[GroupKind]:
            return Counter([(await chat.plan(request(user=user_of(Pool.GATE), n=2))).group.kind for _ in range(300)])

        assert 110 < asyncio.run(kinds())[GroupKind.DUEL] < 190


def test_a_duel_that_lost_its_champion_takes_no_more_groups(world: World) -> None:
    world.add_version(1)
    world.open_duel(1)
    world.add_version(2)
    world.alias(Alias.CHAMPION, 2)
    group = answer(world, n=2, user=user_of(Pool.GATE))
    assert (group.kind, group.duel_id) == (GroupKind.HELDOUT, None)
    assert {completion.version for completion in group.completions} == {2}


@pytest.mark.parametrize(("model", "number"), [("base", 0), ("0", 0), ("1", 1), ("champion", 1), ("challenger", 2), ("2", 2)])
def test_an_explicit_version_answers_but_never_trains_nor_duels(world: World, model: str, number: int) -> None:
    world.add_version(1)
    world.add_version(2)
    world.alias(Alias.CHAMPION, 1)
    world.open_duel(2)
    for pool in Pool:
        group = answer(world, model=f"{POLICY}@{model}", n=2, user=user_of(pool))
        assert (group.kind, group.pool, group.duel_id) == (GroupKind.HELDOUT, Pool.GATE, None)
        assert {completion.version for completion in group.completions} == {number}


@pytest.mark.parametrize("selector", ["@7", "@", "@challenger", "@١", "@-1", "2"])
def test_unknown_models_are_named(world: World, selector: str) -> None:
    with pytest.raises(NotFoundError, match="does not exist") as refused:
        answer(world, model=POLICY + selector)
    assert refused.value.param == "model"


def test_a_conversation_is_linked_to_the_branch_that_was_taken(world: World) -> None:
    user = user_of(Pool.TRAIN)
    first = answer(world, n=2, user=user)
    assert first.completions[0].text != first.completions[1].text
    turns = (*ASK, Message("assistant", first.completions[1].text), Message("user", "and now?"))
    second = answer(world, n=2, user=user, messages=turns)
    assert (second.parent_group_id, second.parent_index) == (first.group_id, 1)
    assert second.conversation_id == first.conversation_id == first.group_id
    assert answer(world, user="somebody else", messages=turns).parent_group_id is None
    assert answer(world, messages=turns).parent_group_id is None


def test_a_named_predecessor_wins_and_must_exist(world: World) -> None:
    first = answer(world, n=2, user=user_of(Pool.GATE))
    edited = (*ASK, Message("assistant", "an edited answer"), Message("user", "and now?"))
    second = answer(world, messages=edited, metadata={"parent": first.group_id})
    assert (second.parent_group_id, second.parent_index) == (first.group_id, None)
    with pytest.raises(InvalidRequestError, match="no stored completion") as refused:
        answer(world, metadata={"parent": "chatcmpl-unknown"})
    assert refused.value.param == "metadata.parent"


def test_an_anonymous_conversation_keeps_the_pool_of_its_predecessor(world: World) -> None:
    gate_opening = next((Message("user", text),) for text in map(str, range(100)) if pool_of(f"user\0{text}", 0.2) is Pool.GATE)
    first = answer(world, messages=gate_opening)
    assert first.pool is Pool.GATE
    second = answer(world, messages=(Message("user", "shortened"),), metadata={"parent": first.group_id})
    assert second.pool is Pool.GATE


def test_an_empty_conversation_id_names_no_conversation(world: World) -> None:
    for text in map(str, range(20)):
        opening = (Message("user", text),)
        group = answer(world, messages=opening, metadata={"conversation_id": ""})
        assert group.pool is pool_of(f"user\0{text}", 0.2)
        assert group.rater_id == f"conversation:{group.group_id}"


def test_max_tokens_default_limit_and_a_prompt_that_fills_the_context(tmp_path: Path) -> None:
    config = fake_config(tmp_path, serve={"max_tokens": 5, "max_context": 60})
    with World(tmp_path / "world", config=config) as world:
        prompt = len(world.policy.tokens.encode_prompt(ASK))
        cut = answer(world)
        assert cut.sampling.max_tokens == 5
        assert cut.completions[0].finish_reason is FinishReason.LENGTH
        assert answer(world, max_tokens=1_000_000).sampling.max_tokens == 60 - prompt
        with pytest.raises(InvalidRequestError, match="leaves no room") as refused:
            answer(world, messages=(Message("user", "x" * 60),))
        assert (refused.value.param, refused.value.code) == ("messages", "context_length_exceeded")


def test_versions_load_on_demand_and_the_least_used_are_evicted(tmp_path: Path) -> None:
    config = fake_config(tmp_path, policy={"max_loaded": 3})
    with World(tmp_path / "world", config=config) as world:
        for number in range(1, 6):
            world.add_version(number)
        world.alias(Alias.CHAMPION, 1)
        chat = service(world)

        async def ask(*selectors: str) -> None:
            for selector in selectors:
                await chat.answer(request(model=f"{POLICY}@{selector}"))

        asyncio.run(ask("champion", "2"))
        assert world.policy.loaded() == {0, 1, 2}
        asyncio.run(ask("3"))
        assert world.policy.loaded() == {0, 1, 3}
        asyncio.run(ask("4", "4", "3", "5", "5"))
        assert world.policy.loaded() == {0, 1, 5}


@pytest.mark.parametrize("asked_between", [True, False])
def test_old_champions_are_unloaded_after_promotions(tmp_path: Path, asked_between: bool) -> None:
    """The loop loads each new champion itself, so that no request ever misses one."""
    config = fake_config(tmp_path, policy={"max_loaded": 3})
    with World(tmp_path / "world", config=config) as world:
        chat = service(world)

        async def promotions() -> None:
            for number in range(1, 7):
                world.policy.load(world.add_version(number))
                world.alias(Alias.CHAMPION, number)
                if asked_between:
                    await chat.answer(request())
                    assert world.policy.loaded() == {0, number, max(number - 1, 0)}
            await chat.answer(request())

        asyncio.run(promotions())
        assert world.policy.loaded() == {0, 5, 6}


def test_what_the_loop_has_loaded_to_measure_is_not_evicted(tmp_path: Path) -> None:
    config = fake_config(tmp_path, policy={"max_loaded": 2})
    with World(tmp_path / "world", config=config) as world:
        for number in (1, 2):
            world.policy.load(world.add_version(number))
        world.alias(Alias.CHAMPION, 1)
        answer(world)
        assert world.policy.loaded() == {0, 1, 2}
        world.alias(Alias.CHAMPION, 2)
        answer(world)
        assert world.policy.loaded() == {0, 2}


def test_a_busy_version_is_not_evicted(tmp_path: Path) -> None:
    gate = threading.Event()
    config = fake_config(tmp_path, policy={"max_loaded": 2})
    with World(tmp_path / "world", config=config, policy=FakePolicy(release=gate)) as world:
        for number in (1, 2):
            world.add_version(number)
        chat = service(world)

        async def both() -> set[int | None]:
            first = asyncio.create_task(chat.answer(request(model=f"{POLICY}@1")))
            while world.policy.queued() < 1:
                await asyncio.sleep(0)
            second = asyncio.create_task(chat.answer(request(model=f"{POLICY}@2")))
            while world.policy.queued() < 2:
                await asyncio.sleep(0)
            assert world.policy.loaded() == {0, 1, 2}
            gate.set()
            return {(await task).group.completions[0].version for task in (first, second)}

        assert asyncio.run(both()) == {1, 2}


class UnloadsOnce(FakePolicy):
    """Loses version 1 between the routing and the sampling of the first request for it, as a closing duel does."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0

    def sample(self, request: Any) -> Any:
        if request.version == 1 and self.lost == 0:
            self.lost += 1
            self.unload(1)
        return super().sample(request)


def test_a_version_unloaded_under_a_request_is_loaded_again(tmp_path: Path) -> None:
    policy = UnloadsOnce()
    with World(tmp_path / "world", policy=policy) as world:
        world.add_version(1)
        group = answer(world, model=f"{POLICY}@1")
        assert (group.completions[0].version, policy.lost) == (1, 1)


def test_a_full_queue_and_a_closed_engine_are_engine_errors(tmp_path: Path) -> None:
    gate = threading.Event()
    config = fake_config(tmp_path, serve={"queue_limit": 1})
    with World(tmp_path / "world", config=config, policy=FakePolicy(release=gate)) as world:
        chat = service(world)

        async def one_too_many() -> None:
            waiting = asyncio.create_task(chat.answer(request()))
            while world.policy.queued() < 1:
                await asyncio.sleep(0)
            with pytest.raises(EngineError, match="waiting"):
                await chat.answer(request())
            gate.set()
            await waiting

        asyncio.run(one_too_many())
        world.policy.close()
        with pytest.raises(EngineError, match="closed"):
            answer(world)


def test_what_was_sampled_is_not_refused_by_a_store_that_became_busy(tmp_path: Path) -> None:
    gate, held = threading.Event(), threading.Event()
    config = fake_config(tmp_path, store={"max_waiting": 1})
    with World(tmp_path / "world", config=config, policy=FakePolicy(release=gate)) as world:

        async def in_between() -> Group:
            answering = asyncio.create_task(service(world).answer(request()))
            while world.policy.queued() < 1:
                await asyncio.sleep(0)
            world.store.submit(lambda _: held.wait(20))
            gate.set()
            while not answering.done() and world.store.waiting < 2:
                await asyncio.sleep(0)
            held.set()
            return (await answering).group

        group = asyncio.run(in_between())
        assert world.group(group.group_id) == as_stored(group)


def test_a_stream_stores_the_group_first_and_its_completions_before_the_end(world: World) -> None:
    async def play() -> None:
        stream = await service(world).stream(request(n=2, user=user_of(Pool.TRAIN)))
        assert world.group(stream.group.group_id).completions == ()
        texts = ["", ""]
        async for batch in stream.batches():
            for event in batch:
                texts[event.index] += event.text
        answered = await stream.finish()
        assert [completion.text for completion in answered.group.completions] == texts
        assert world.group(stream.group.group_id) == as_stored(answered.group)
        stream.abandon()  # after the end it does nothing
        assert not world.group(stream.group.group_id).is_abandoned

    asyncio.run(play())


def test_an_abandoned_stream_keeps_what_was_said_and_cannot_be_picked(world: World) -> None:
    async def play() -> AnswerStream:
        stream = await service(world).stream(request(n=2))
        async for _ in stream.batches():
            break
        stream.abandon()
        return stream

    stream = asyncio.run(play())
    world.store.write(lambda _: None)  # the writer is first in, first out
    group = world.group(stream.group.group_id)
    assert group.is_abandoned
    assert [completion.finish_reason for completion in group.completions] == [FinishReason.ABANDONED] * 2
    assert "".join(completion.text for completion in group.completions) != ""


def test_no_group_straddles_a_swap(world: World) -> None:
    for number in (1, 2, 3):
        world.policy.load(world.add_version(number))
    done = threading.Event()

    def swap() -> None:
        number = 0
        while not done.is_set():
            number = (number + 1) % 4
            world.alias(Alias.CHAMPION, number)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:

        async def ask() -> list[Group]:
            chat = service(world)
            asked = [chat.answer(request(n=2, user=user_of(Pool.TRAIN))) for _ in range(200)]
            return [answered.group for answered in await asyncio.gather(*asked)]

        found = asyncio.run(ask())
    finally:
        done.set()
        swapper.join()
    versions = [{completion.version for completion in group.completions} for group in found]
    assert all(len(of_group) == 1 for of_group in versions)
    assert len(set.union(*versions)) > 1


def test_a_closed_duel_gives_the_gate_pool_back_to_the_champion(world: World) -> None:
    world.add_version(1)
    duel = world.open_duel(1)
    world.close_duel(duel, CycleState.REJECTED)
    assert answer(world, n=2, user=user_of(Pool.GATE)).kind is GroupKind.HELDOUT


# --- streamed duels


class OneAfterTheOther(FakePolicy):
    """Its ``first`` version has said everything before any other says a word, as a lane whose burst comes first."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first
        self._engine = FakePolicy()
        self._said = threading.Event()

    def load(self, version: Any) -> None:
        self._engine.load(version)
        super().load(version)

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        if request.version == self._first:
            future = self._engine.sample(request)
            future.add_done_callback(lambda _: self._said.set())
            return future
        assert request.on_token is not None
        listener = request.on_token

        def waits(event: TokenEvent) -> None:
            assert self._said.wait(20)
            listener(event)

        return super().sample(replace(request, on_token=waits))

    def close(self) -> None:
        self._engine.close()
        super().close()


@pytest.mark.parametrize("first", [0, 1])
def test_a_streamed_duel_does_not_tell_who_is_who_by_its_order(tmp_path: Path, first: int) -> None:
    """Whichever version is sampled first, and whichever index it has: the tokens come in the same order."""
    orders: dict[tuple[int, ...], list[int]] = {}
    for seed in range(20):
        with World(tmp_path / str(seed), policy=OneAfterTheOther(first)) as world:
            world.policy.load(world.add_version(1))
            world.open_duel(1)

            async def play(world: World, seed: int) -> tuple[Group, list[int]]:
                stream = await service(world, seed).stream(request(n=2, user=user_of(Pool.GATE)))
                order = [event.index async for batch in stream.batches() for event in batch]
                return (await stream.finish()).group, order

            group, order = asyncio.run(play(world, seed))
            assert group.kind is GroupKind.DUEL
            assert world.group(group.group_id) == as_stored(group)
            orders[tuple(completion.version or 0 for completion in group.completions)] = order
        if len(orders) == 2:
            break
    lengths = {len(completion.token_ids) for completion in group.completions}
    assert lengths == {10}
    assert orders == {(0, 1): [0, 1] * 10, (1, 0): [0, 1] * 10}


def over(error: Exception | None = None) -> Future[tuple[Completion, ...]]:
    future: Future[tuple[Completion, ...]] = Future()
    if error is None:
        future.set_result(())
    else:
        future.set_exception(error)
    return future


def test_sides_go_in_step_until_one_is_over() -> None:
    said: list[tuple[int, str]] = []
    sides = Lockstep(lambda event: said.append((event.index, event.text)), 2)

    def add(index: int, texts: str) -> None:
        for text in texts:
            sides.add(index, TokenEvent(0, 1, -1.0, text))

    add(1, "abc")
    assert said == []
    add(0, "xy")
    assert said == [(0, "x"), (1, "a"), (0, "y"), (1, "b")]
    sides.end(0, over())
    assert said[4:] == [(1, "c")]
    add(1, "d")
    sides.end(1, over())
    assert said[5:] == [(1, "d")]


def test_a_side_that_is_over_early_does_not_run_ahead() -> None:
    said: list[int] = []
    sides = Lockstep(lambda event: said.append(event.index), 2)
    for _ in range(3):
        sides.add(0, TokenEvent(0, 1, -1.0, "x"))
    sides.end(0, over())
    assert said == []
    sides.add(1, TokenEvent(0, 1, -1.0, "a"))
    assert said == [0, 1]
    sides.end(1, over())
    assert said == [0, 1, 0, 0]


def test_a_side_that_fails_releases_nothing() -> None:
    said: list[int] = []
    sides = Lockstep(lambda event: said.append(event.index), 2)
    sides.add(0, TokenEvent(0, 1, -1.0, "x"))
    sides.end(1, over(EngineError("broken")))
    cancelled: Future[tuple[Completion, ...]] = Future()
    cancelled.cancel()
    sides.end(1, cancelled)
    assert said == []


def test_an_answer_that_is_seen_before_its_callbacks_ran_took_until_now() -> None:
    answer: Future[tuple[Completion, ...]] = Future()
    answer.set_result((Completion("yes"),))  # whose own thread may be held up between this and the callbacks
    (one,) = Took(perf_counter() - 1.0).noted([(answer, answer.result())])
    assert one.total_ms is not None
    assert one.total_ms >= 1_000
