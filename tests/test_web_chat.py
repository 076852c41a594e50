"""The OpenAI wire over real HTTP: the official client unmodified, bodies by OpenAI's schema, strictness, streams, duels."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import openai
import pytest
from tests.openai_schema import validate
from tests.server import POLICY, RunningServer, chat_body, fake_config, sse_chunks, user_of
from tests.waiting import PATIENCE_S, until

from pairloop.errors import EngineError
from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import TokenEvent
from pairloop.types import Alias, FinishReason, Group, GroupKind, Pool

ASK: Any = [{"role": "user", "content": "Where is my order?"}]

Serve = Callable[..., RunningServer]


@pytest.fixture
def server(serve: Serve) -> RunningServer:
    return serve()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that only send it what it must refuse."""
    with RunningServer(tmp_path_factory.mktemp("shared") / "server") as server:
        yield server


# --- the official client


def test_one_answer(server: RunningServer) -> None:
    raw = server.openai.chat.completions.with_raw_response.create(model=POLICY, messages=ASK)
    reply = raw.parse()
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model) == ("chat.completion", f"{POLICY}@0")
    assert reply.choices[0].message.role == "assistant"
    assert (reply.choices[0].message.content or "").startswith("answer ")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert raw.headers["x-request-id"].startswith("req_")
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["x-pairloop-model-version"] == f"{POLICY}@0"
    assert server.group(reply.id).completions[0].text == reply.choices[0].message.content


def test_two_answers_a_pick_and_the_stored_completion(server: RunningServer) -> None:
    user = user_of(Pool.TRAIN)
    reply = server.openai.chat.completions.create(model=POLICY, messages=ASK, n=2, user=user)
    assert [choice.index for choice in reply.choices] == [0, 1]
    picked: Any = server.openai.post(
        "/preferences", cast_to=object, body={"inference_id": reply.id, "outcome": "chosen", "chosen_index": 1}
    )
    assert picked["duplicate"] is False
    stored = server.openai.chat.completions.retrieve(reply.id)
    assert [choice.message.content for choice in stored.choices] == [choice.message.content for choice in reply.choices]
    assert stored.model == reply.model
    assert server.group(reply.id).user == user


def test_opting_in_by_header_and_by_metadata(server: RunningServer) -> None:
    create = server.openai.chat.completions.create
    assert len(create(model=POLICY, messages=ASK).choices) == 1
    assert len(create(model=POLICY, messages=ASK, extra_headers={"x-pairloop-pair": "allow"}).choices) == 2
    assert len(create(model=POLICY, messages=ASK, metadata={"pair": "allow"}).choices) == 2
    assert len(create(model=POLICY, messages=ASK, metadata={"pair": "deny"}).choices) == 1


def test_a_stream_of_one(server: RunningServer) -> None:
    chunks = list(server.openai.chat.completions.create(model=POLICY, messages=ASK, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert server.group(chunks[0].id).completions[0].text == text != ""


def test_a_stream_of_two_with_usage(server: RunningServer) -> None:
    options: Any = {"include_usage": True}
    chunks = list(server.openai.chat.completions.create(model=POLICY, messages=ASK, n=2, stream=True, stream_options=options))
    *spoken, last = chunks
    assert all(chunk.usage is None for chunk in spoken)
    assert last.choices == []
    assert last.usage is not None
    group = server.group(last.id)
    assert last.usage.completion_tokens == sum(len(completion.token_ids) for completion in group.completions)
    texts, ends = ["", ""], [0, 0]
    for chunk in spoken:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] += choice.finish_reason == "stop"
    assert texts == [completion.text for completion in group.completions]
    assert ends == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_join_to_the_text(server: RunningServer, stream: bool) -> None:
    if stream:
        chunks = list(server.openai.chat.completions.create(model=POLICY, messages=ASK, logprobs=True, stream=True))
        entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []]
        group = server.group(chunks[0].id)
    else:
        reply = server.openai.chat.completions.create(model=POLICY, messages=ASK, logprobs=True, top_logprobs=0)
        assert reply.choices[0].logprobs is not None
        entries = reply.choices[0].logprobs.content or []
        group = server.group(reply.id)
    completion = group.completions[0]
    assert "".join(entry.token for entry in entries) == completion.text
    assert [bytes(entry.bytes or []).decode() for entry in entries] == [entry.token for entry in entries]
    assert [entry.logprob for entry in entries] == pytest.approx(completion.logps[: len(entries)], abs=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_cut_and_its_tokens_are_kept(server: RunningServer, stream: bool) -> None:
    body = chat_body(stop=["wer "], stream=stream, logprobs=True)
    response = server.http.post("/v1/chat/completions", json=body)
    if stream:
        chunks = sse_chunks(response.text)
        group = server.group(chunks[0]["id"])
        choices = [chunk["choices"][0] for chunk in chunks]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        entries = [entry for choice in choices if "logprobs" in choice for entry in choice["logprobs"]["content"]]
    else:
        choice = response.json()["choices"][0]
        group = server.group(response.json()["id"])
        text, entries = choice["message"]["content"], choice["logprobs"]["content"]
    assert text == group.completions[0].text == "ans"
    assert "".join(entry["token"] for entry in entries) == "ans"
    assert len(group.completions[0].token_ids) == len("answer ")


def test_length_and_sampling_parameters_reach_the_group(server: RunningServer) -> None:
    reply = server.openai.chat.completions.create(
        model=POLICY, messages=ASK, max_completion_tokens=3, temperature=0, top_p=0.5, seed=7, n=2, metadata={"a": "b"}
    )
    assert [choice.finish_reason for choice in reply.choices] == ["length", "length"]
    sampling = server.group(reply.id).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (3, 0.0, 0.5, 7)
    assert server.group(reply.id).metadata == {"a": "b"}


def test_models_are_listed_policy_first_and_each_answers(server: RunningServer) -> None:
    server.add_version(1)
    names = [model.id for model in server.openai.models.list()]
    assert names == [POLICY, f"{POLICY}@0", f"{POLICY}@1"]
    server.alias(Alias.CHALLENGER, 1)
    for name in [*names, *(f"{POLICY}@{alias}" for alias in ("base", "champion", "challenger"))]:
        assert server.openai.models.retrieve(name).object == "model"
        assert server.openai.chat.completions.create(model=name, messages=ASK).choices
    for unknown in ("gpt-4", "gpt-4@base", f"{POLICY}@", f"{POLICY}@9", f"{POLICY}@crown"):
        with pytest.raises(openai.NotFoundError) as refused:
            server.openai.models.retrieve(unknown)
        assert refused.value.param == "model"
        with pytest.raises(openai.NotFoundError) as refused:
            server.openai.chat.completions.create(model=unknown, messages=ASK)
        assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


def test_the_clients_own_errors(server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        server.openai.chat.completions.create(model="gpt-4", messages=ASK)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        server.openai.chat.completions.create(model=POLICY, messages=ASK, logprobs=True, top_logprobs=21)
    assert refused.value.param == "top_logprobs"
    assert server.openai.chat.completions.create(model=POLICY, messages=ASK).choices


def test_content_parts_echoed_messages_and_neutral_fields_are_taken(server: RunningServer) -> None:
    first = server.openai.chat.completions.create(model=POLICY, messages=ASK, user="rita")
    echoed = first.choices[0].message.model_dump()
    messages: Any = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "Where is"}, {"type": "text", "text": "my order?"}]},
        echoed,
        {"role": "user", "content": "thanks"},
    ]
    response = server.chat(
        messages=messages,
        user="rita",
        tools=None,
        tool_choice="none",
        frequency_penalty=0,
        presence_penalty=0.0,
        response_format={"type": "text"},
        service_tier="auto",
        store=True,
    )
    assert response.status_code == 200, response.text
    group = server.group(response.json()["id"])
    assert isinstance(group.prompt, tuple)
    assert [message.role for message in group.prompt] == ["system", "user", "assistant", "user"]
    assert group.prompt[1].content == "Where is\nmy order?"
    assert group.parent_group_id == first.id


# --- strictness

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [None]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": 123}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "rita"}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 2.5}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 0}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"user": 7}, "user"),
        ({"user": "a\x00b"}, "user"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, f"metadata.{'k' * 65}"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"parent": "chatcmpl-unknown"}}, "metadata.parent"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "id": 7}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"tools": "all"}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 7}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "s"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"50": 1}}, "logit_bias"),
        ({"audio": {}}, "audio"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_bad_fields_are_refused_by_name(shared_server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = shared_server.http.post("/v1/chat/completions", json={**chat_body(), **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    assert shared_server.chat().status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"messages": "\\ud800"}'],
)
def test_bodies_that_are_no_request(shared_server: RunningServer, body: bytes) -> None:
    response = shared_server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert shared_server.chat().status_code == 200


# --- OpenAI's schema


def test_bodies_follow_the_published_schema(server: RunningServer) -> None:
    whole = server.chat(n=2, logprobs=True)
    validate("CreateChatCompletionResponse", whole.json())
    validate("CreateChatCompletionResponse", server.chat().json())
    validate("CreateChatCompletionResponse", server.http.get(f"/v1/chat/completions/{whole.json()['id']}").json())
    for options in ({}, {"logprobs": True, "n": 2, "stream_options": {"include_usage": True}}):
        for chunk in sse_chunks(server.chat(stream=True, **options).text):
            validate("CreateChatCompletionStreamResponse", chunk)
    validate("ListModelsResponse", server.http.get("/v1/models").json())
    validate("Model", server.http.get(f"/v1/models/{POLICY}").json())
    for response in (server.chat(n=0), server.chat(model="gpt-4"), server.http.get("/nowhere"), server.http.put("/v1/models")):
        validate("ErrorResponse", response.json())


def test_the_schema_check_can_fail(server: RunningServer) -> None:
    body = server.chat().json()
    del body["choices"][0]["message"]["refusal"]
    with pytest.raises(jsonschema.ValidationError):
        validate("CreateChatCompletionResponse", body)


# --- durability, streams, duels


class Held:
    """A sampler that waits for ``release``, with the server that uses it."""

    def __init__(self, serve: Serve, **options: Any) -> None:
        self.release = threading.Event()
        self.server = serve(policy=FakePolicy(release=self.release), **options)

    def wait_for_queue(self, n: int) -> None:
        until(lambda: self.server.policy.queued() == n)


def test_the_answer_waits_for_the_store(server: RunningServer) -> None:
    """While the writer is busy nothing is answered; when the answer is there, so is the group."""
    writing, go_on = threading.Event(), threading.Event()

    def hold_the_writer(_: Any) -> None:
        writing.set()
        go_on.wait(PATIENCE_S)

    held = server.store.submit(hold_the_writer)
    assert writing.wait(PATIENCE_S)
    with ThreadPoolExecutor(2) as clients:
        whole = clients.submit(server.chat, n=2)
        streamed = clients.submit(server.chat, n=2, stream=True)
        until(lambda: server.policy.queued() == 0)
        assert not whole.done()
        assert not streamed.done()
        go_on.set()
        held.result(PATIENCE_S)
        assert not server.group(whole.result(PATIENCE_S).json()["id"]).is_abandoned
        assert not server.group(sse_chunks(streamed.result(PATIENCE_S).text)[0]["id"]).is_abandoned


class SpeaksSlowly(FakePolicy):
    """Says half of a completion, and then nothing until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def sample(self, request: Any) -> Any:
        said, inner = 0, request.on_token

        def slowly(event: Any) -> None:
            nonlocal said
            said += 1
            if said == 5:
                self.go_on.wait(PATIENCE_S)
            inner(event)

        return super().sample(request if inner is None else replace(request, on_token=slowly))


def test_a_client_that_goes_away_leaves_an_abandoned_group(serve: Serve) -> None:
    policy = SpeaksSlowly()
    server = serve(policy=policy)
    body = json.dumps(chat_body(n=2, stream=True)).encode()
    host, port = server.http.base_url.host, server.http.base_url.port
    with socket.create_connection((host, port or 80), timeout=10) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}"
        client.sendall(f"{head}\r\ncontent-type: application/json\r\n\r\n".encode() + body)
        received = b""
        while b'"content":"a' not in received:
            received += client.recv(4096)
    group_id = received.split(b'"id":"')[1].split(b'"')[0].decode()
    until(lambda: len(server.group(group_id).completions) == 2)
    group = server.group(group_id)
    assert {completion.finish_reason for completion in group.completions} == {FinishReason.ABANDONED}
    assert group.completions[0].text == "answ"
    picked = server.http.post("/v1/preferences", json={"inference_id": group_id, "chosen_index": 0})
    assert picked.status_code == 409
    assert "never answered" in picked.json()["error"]["message"]
    assert server.http.get(f"/v1/chat/completions/{group_id}").status_code == 404
    policy.go_on.set()
    assert server.chat().status_code == 200


class BreaksMidway(FakePolicy):
    """The engine dies while it speaks."""

    def sample(self, request: Any) -> Any:
        broken: Future[Any] = Future()
        if request.on_token is not None:
            request.on_token(TokenEvent(0, 97, -1.0, "a"))
        broken.set_exception(EngineError("the engine broke"))
        return broken


def test_an_engine_that_breaks(serve: Serve) -> None:
    server = serve(policy=BreaksMidway())
    whole = server.chat()
    assert (whole.status_code, whole.headers["retry-after"]) == (503, "1")
    assert whole.json()["error"]["code"] == "engine_unavailable"
    stream = server.openai.chat.completions.create(model=POLICY, messages=ASK, stream=True)
    with pytest.raises(openai.APIError, match="the engine broke"):
        list(stream)


class BreaksUnexpectedly(FakePolicy):
    """A fault of the engine that nobody thought of, in the middle of an answer."""

    def sample(self, request: Any) -> Any:
        broken: Future[Any] = Future()
        if request.on_token is not None:
            request.on_token(TokenEvent(0, 97, -1.0, "a"))
        broken.set_exception(RuntimeError("a secret path"))
        return broken


def test_an_unexpected_fault_mid_stream_is_told_and_the_server_goes_on(serve: Serve) -> None:
    server = serve(policy=BreaksUnexpectedly())
    text = server.chat(stream=True).text
    *_, last = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "internal_error")
    assert "secret" not in text
    group_id = json.loads(text.split("\n\n")[0].removeprefix("data: "))["id"]
    until(lambda: bool(server.group(group_id).completions))
    assert server.group(group_id).is_abandoned
    assert server.http.get("/health").status_code == 200


def test_a_full_queue_is_503_with_retry_after(serve: Serve, tmp_path: Path) -> None:
    held = Held(serve, config=fake_config(tmp_path / "state", serve={"queue_limit": 1}))
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(held.server.chat)
        held.wait_for_queue(1)
        for stream in (False, True):
            refused = held.server.chat(stream=stream)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        held.release.set()
        assert waiting.result(PATIENCE_S).status_code == 200


def test_a_duel_does_not_unblind_itself(server: RunningServer) -> None:
    server.add_version(1)
    server.open_duel(1)
    judge = user_of(Pool.GATE)
    whole = server.chat(n=2, user=judge)
    body = whole.json()
    assert server.group(body["id"]).kind is GroupKind.DUEL
    assert body["model"] == POLICY
    assert not [name for name in whole.headers if "version" in name]
    assert "@" not in whole.text
    streamed = server.chat(n=2, user=judge, stream=True)
    assert "@" not in streamed.text
    assert not [name for name in streamed.headers if "version" in name]
    fingerprints = {server.chat(n=2, user=judge).json()["system_fingerprint"] for _ in range(5)}
    assert len(fingerprints) == 1
    plain = server.chat(n=2, user=user_of(Pool.TRAIN)).json()
    assert plain["model"] == f"{POLICY}@0"
    assert plain["system_fingerprint"] not in fingerprints

    before = server.http.get(f"/v1/chat/completions/{body['id']}").json()
    assert "versions" not in before
    assert before["model"] == POLICY
    picked = server.http.post("/v1/preferences", json={"inference_id": body["id"], "chosen_index": 1, "rater_id": judge})
    assert picked.status_code == 201
    answered_by = [f"{POLICY}@{completion.version}" for completion in server.group(body["id"]).completions]
    assert sorted(answered_by) == [f"{POLICY}@0", f"{POLICY}@1"]
    assert picked.json()["versions"] == answered_by
    after = server.http.get(f"/v1/chat/completions/{body['id']}").json()
    assert after["versions"] == answered_by


def test_replies_name_one_version_while_the_alias_flips(server: RunningServer) -> None:
    for number in (1, 2):
        server.policy.load(server.add_version(number))
    done = threading.Event()

    def flip() -> None:
        number = 0
        while not done.is_set():
            number = (number + 1) % 3
            server.alias(Alias.CHAMPION, number)

    flipper = threading.Thread(target=flip)
    flipper.start()
    try:
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(server.chat, n=2, user=user_of(Pool.TRAIN), stream=bool(i % 4 == 0)) for i in range(120)]
            replies = [reply.result(20) for reply in asked]
    finally:
        done.set()
        flipper.join()
    assert {reply.status_code for reply in replies} == {200}
    names = set()
    for reply in replies:
        body = sse_chunks(reply.text)[0] if reply.text.startswith("data:") else reply.json()
        group: Group = server.group(body["id"])
        assert {f"{POLICY}@{completion.version}" for completion in group.completions} == {body["model"]}
        names.add(body["model"])
    assert len(names) > 1


def test_many_requests_at_once_each_have_their_group(server: RunningServer) -> None:
    with ThreadPoolExecutor(16) as clients:
        replies = [reply.json() for reply in clients.map(lambda i: server.chat(n=2, user=f"user-{i}"), range(200))]
    ids = [reply["id"] for reply in replies]
    assert len(set(ids)) == 200
    assert {server.group(group_id).user for group_id in ids} == {f"user-{i}" for i in range(200)}


# --- over-long bodies


def _megabytes(n: int) -> Iterator[bytes]:
    yield b'{"model": "'
    for _ in range(n):
        yield b"x" * 1_000_000
    yield b'"}'


def test_over_long_bodies_are_413_and_the_server_goes_on(server: RunningServer) -> None:
    declared = b"".join(_megabytes(50))
    for content in (declared, _megabytes(50)):
        response = server.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert server.chat().status_code == 200


def test_a_body_that_only_claims_to_be_long_is_refused_unread(server: RunningServer) -> None:
    host, port = server.http.base_url.host, server.http.base_url.port
    with socket.create_connection((host, port or 80), timeout=10) as client:
        head = f"POST /v1/feedback HTTP/1.1\r\nhost: {host}\r\nexpect: 100-continue\r\ncontent-length: 999999999999"
        client.sendall(f"{head}\r\n\r\n".encode())
        assert b" 413 " in client.recv(4096)
    assert server.chat().status_code == 200
