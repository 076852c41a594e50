"""The likeliest tokens at each place, from the engines and over HTTP; and response formats, for engines that can hold one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.openai_schema import validate
from tests.server import POLICY, RunningServer, chat_body, sse_chunks, user_of
from tests.stores import open_store
from tests.tiny_models import byte_tokenizer, letter_tokenizer, write_model

from pairloop.config import PolicySection
from pairloop.policy.decoding import draw, likeliest
from pairloop.policy.fake import FakePolicy
from pairloop.policy.local import LocalPolicy
from pairloop.policy.protocols import RESPONSE_FORMAT, TOP_LOGPROBS, SampleRequest, TokenEvent, TokenSequence
from pairloop.policy.text import TextStream
from pairloop.types import GroupKind, Pool, SamplingParams

ASK: Any = [{"role": "user", "content": "Where is my order?"}]
PROMPTS = ((1, 2, 3), (4, 5, 6, 7, 1, 2), (3,))
Serve = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPolicy]:
    folder = write_model(tmp_path_factory.mktemp("letters"), tokenizer=letter_tokenizer())
    local = LocalPolicy(folder, PolicySection(model=str(folder), max_batch=8))
    yield local
    local.close()


def events_of(policy: LocalPolicy, prompt: tuple[int, ...], top: int, **params: Any) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    policy.sample(SampleRequest(prompt, 0, 1, SamplingParams(max_tokens=6, **params), events.append, top)).result(timeout=60)
    return events


def test_the_local_engine_names_the_likeliest_with_their_raw_log_probs(policy: LocalPolicy) -> None:
    assert TOP_LOGPROBS in policy.abilities
    for prompt in PROMPTS:
        for params in ({}, {"temperature": 0.3, "top_p": 0.7}):  # what is told is raw, whatever was drawn from
            events = events_of(policy, prompt, 8, seed=3, **params)
            sampled = tuple(event.token_id for event in events)
            for place, event in enumerate(events):
                logps = [top.logp for top in event.top]
                assert logps == sorted(logps, reverse=True)
                assert sum(map(math.exp, logps)) == pytest.approx(1.0, abs=1e-5), "all eight tokens of the vocabulary"
                by_id = {top.token_id: top for top in event.top}
                assert by_id[event.token_id].logp == event.logp, "one number for one token"
                assert by_id[event.token_id].text == event.text
                other = event.top[0].token_id
                (scored,) = policy.logps(0, [TokenSequence(prompt, (*sampled[:place], other))])
                assert scored[-1] == pytest.approx(event.top[0].logp, abs=1e-4)


def test_greedy_takes_the_first_and_nobody_is_told_more_than_asked(policy: LocalPolicy) -> None:
    for event in events_of(policy, PROMPTS[0], 3, temperature=0.0):
        assert len(event.top) == 3
        assert event.top[0].token_id == event.token_id
    assert {event.top for event in events_of(policy, PROMPTS[0], 0)} == {()}


def test_rows_that_ask_and_rows_that_do_not_share_a_batch(policy: LocalPolicy) -> None:
    told: dict[int, list[TokenEvent]] = {top: [] for top in (0, 2, 5)}
    params = SamplingParams(max_tokens=6, seed=1)
    waiting = [policy.sample(SampleRequest(PROMPTS[1], 0, 1, params, told[top].append, top)) for top in told]
    for future in waiting:
        future.result(timeout=60)
    assert [{len(event.top) for event in events} for events in told.values()] == [{0}, {2}, {5}]
    assert len({tuple(event.token_id for event in events) for events in told.values()}) == 1


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 200), st.integers(1, 20))
def test_the_likeliest_are_those_of_a_full_sort(seed: int, rows: int, width: int, n: int) -> None:
    logits_BV = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 8
    ids, logps = likeliest(logits_BV, n)
    expected, _ = logits_BV.double().log_softmax(-1).sort(dim=-1, descending=True)
    torch.testing.assert_close(logps.double(), expected[:, :n], atol=1e-4, rtol=0)
    drawn, drawn_logps = draw(logits_BV, [0.0] * rows, [0.0] * rows, [1.0] * rows)
    assert torch.equal(drawn, ids[:, 0])
    assert torch.equal(drawn_logps, logps[:, 0])


def test_what_another_token_would_have_added() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(lambda ids: str(tokenizer.decode(list(ids))), ("zz",))
    a, accented = tokenizer.encode("a").ids[0], tokenizer.encode("é").ids
    assert stream.would_add(a) == "a"
    stream.add(a)
    stream.add(accented[0])
    assert stream.would_add(accented[1]).endswith("é")
    assert stream.add(accented[1]) == "é"
    assert stream.would_add(a) == "a"


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that change nothing which another would see."""
    with RunningServer(tmp_path_factory.mktemp("shared") / "server") as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_likeliest_tokens_over_http(shared_server: RunningServer, stream: bool, top: int) -> None:
    server = shared_server
    body = chat_body(logprobs=True, top_logprobs=top, stream=stream, n=2, stop=["9"])
    response = server.http.post("/v1/chat/completions", json=body)
    if stream:
        chunks = sse_chunks(response.text)
        for chunk in chunks:
            validate("CreateChatCompletionStreamResponse", chunk)
        group_id, choices = chunks[0]["id"], [chunk["choices"][0] for chunk in chunks]
    else:
        validate("CreateChatCompletionResponse", response.json())
        group_id, choices = response.json()["id"], response.json()["choices"]
    for index, completion in enumerate(server.group(group_id).completions):
        mine = [choice for choice in choices if choice["index"] == index and choice.get("logprobs")]
        entries = [entry for choice in mine for entry in choice["logprobs"]["content"]]
        assert "".join(entry["token"] for entry in entries) == completion.text
        for entry in entries:
            assert len(entry["top_logprobs"]) <= top
            assert [len(entry["top_logprobs"])] == [min(top, 1 if entry["token"] in "answer " else 10)]
            for other in entry["top_logprobs"]:
                assert bytes(other["bytes"]).decode() == other["token"]
                assert other["logprob"] <= 0


def test_log_probs_would_tell_the_sides_of_a_duel_apart_so_they_get_none(serve: Serve) -> None:
    server = serve()
    server.add_version(1, skill=9)
    server.open_duel(1)
    judge = user_of(Pool.GATE)
    assert server.group(server.chat(n=2, user=judge).json()["id"]).kind is GroupKind.DUEL
    for stream in (False, True):
        for options in ({"logprobs": True}, {"logprobs": True, "top_logprobs": 3}):
            reply = server.chat(n=2, user=judge, stream=stream, **options)
            body = sse_chunks(reply.text)[0] if stream else reply.json()
            group = server.group(body["id"])
            assert (group.kind, {one.version for one in group.completions}) == (GroupKind.HELDOUT, {0})


class OneAtATime(FakePolicy):
    """An engine that knows the sampled token's log-prob alone."""

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset()


def test_an_engine_that_cannot_refuses_by_name_and_goes_on(serve: Serve) -> None:
    server = serve(policy=OneAtATime())
    for stream in (False, True):
        refused = server.chat(logprobs=True, top_logprobs=2, stream=stream)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")
    assert server.chat(logprobs=True, top_logprobs=0).status_code == 200


# --- response formats


class HoldsFormats(FakePolicy):
    """An engine that says it can hold a format, and notes what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset({RESPONSE_FORMAT})

    def sample(self, request: SampleRequest) -> Any:
        self.asked.append(request.response_format)
        return super().sample(request)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "order", "schema": {"type": "object"}, "strict": True}}


def test_formats_reach_an_engine_that_can_as_they_were_sent(serve: Serve) -> None:
    policy = HoldsFormats()
    server = serve(policy=policy)
    create = server.openai.chat.completions.create
    for form in ({"type": "json_object"}, SCHEMA, {"type": "text"}):
        reply = create(model=POLICY, messages=ASK, response_format=form)  # type: ignore[call-overload]
        assert policy.asked.pop() == (None if form["type"] == "text" else form)
        constrained = server.group(reply.id).sampling
        assert constrained.is_constrained is constrained.is_tempered is (form["type"] != "text"), "not the policy's own draw"
    server.add_version(1)
    server.open_duel(1)
    server.chat(n=2, user=user_of(Pool.GATE), response_format=SCHEMA, stream=True)
    assert policy.asked == [SCHEMA, SCHEMA]


def test_a_format_is_refused_by_name_where_the_engine_cannot(serve: Serve) -> None:
    server = serve()
    for form in ({"type": "json_object"}, SCHEMA):
        for stream in (False, True):
            refused = server.chat(response_format=form, stream=stream)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
    assert server.chat(response_format={"type": "text"}).status_code == 200


def test_groups_stored_before_formats_were_known_are_read(tmp_path: Path) -> None:
    from tests.store_rows import a_group

    from pairloop.store import groups

    with open_store(tmp_path / "artifacts") as store:
        store.write(lambda c: groups.insert(c, a_group("old")))
        old = '{"max_tokens": 9, "temperature": 1.0, "top_p": 1.0, "stop": [], "seed": null}'
        store.write(lambda c: c.execute(sa.text("UPDATE groups SET sampling = :old"), {"old": old}))
        with store.reading() as c:
            group = groups.get(c, "old")
    assert group is not None
    assert group.sampling == SamplingParams(max_tokens=9)
