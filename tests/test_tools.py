"""Tools over HTTP: offered, called, answered, streamed; by the official client, against the published schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.openai_schema import validate
from tests.server import POLICY, RunningServer, chat_body, sse_chunks, user_of

from pairloop.loop.serve import call_id
from pairloop.loop.serve.calls import call_origin
from pairloop.policy.calls import CallReader, read_answer
from pairloop.policy.fake import EOS, FakePolicy, FakeTokens
from pairloop.policy.protocols import SampleRequest, TokenEvent
from pairloop.store import new_group_id
from pairloop.types import Completion, FinishReason, Pool, offered_tools, spoken

ASK: Any = [{"role": "user", "content": "Where is order 17?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "order_status",
        "description": "Where an order is.",
        "parameters": {"type": "object", "properties": {"order": {"type": "integer"}}, "required": ["order"]},
    },
}
CALL = '<tool_call>\n{"name": "order_status", "arguments": {"order": 17}}\n</tool_call>'
OTHER_CALL = '<tool_call>{"name": "refund", "arguments": {}}</tool_call>'
Serve = Callable[..., RunningServer]


class Says(FakePolicy):
    """Answers each request with the given texts in turn, byte by byte, cut at stop strings and at the length asked for."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.texts = texts
        self.asked: list[SampleRequest] = []

    def sample(self, request: SampleRequest) -> Any:
        self.asked.append(request)
        made = [self._said(request, index) for index in range(request.n)]
        future = super().sample(SampleRequest(request.prompt_token_ids, request.version))
        future.result(10)
        done: Any = type(future)()
        done.set_result(tuple(made))
        return done

    def _said(self, request: SampleRequest, index: int) -> Completion:
        whole = self.texts[index % len(self.texts)]
        found = [(whole.find(stop), stop) for stop in request.params.stop if stop in whole]
        at, stop = min(found, default=(len(whole), ""))
        ids, text, reason = list(whole[: at + len(stop)].encode()), whole[:at], FinishReason.STOP
        if len(ids) > request.params.max_tokens:
            ids = ids[: request.params.max_tokens]
            text, reason = bytes(ids).decode(), FinishReason.LENGTH
        elif not stop:
            ids.append(EOS)
        for place, token in enumerate(ids):
            if request.on_token is not None:
                request.on_token(TokenEvent(index, token, -0.5, text[place : place + 1]))
        return Completion(text, tuple(ids), (-0.5,) * len(ids), request.version, reason)


def calls_of(choice: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]


def test_a_call_is_read_out_of_the_answer_and_the_text_is_kept(serve: Serve) -> None:
    server = serve(policy=Says(CALL))
    reply = server.openai.chat.completions.create(model=POLICY, messages=ASK, tools=[TOOL], tool_choice="auto")
    (choice,) = reply.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert calls_of(choice) == [("order_status", '{"order": 17}')]
    assert (choice.message.tool_calls or [])[0].id.startswith("call_")
    group = server.group(reply.id)
    assert group.completions[0].text == CALL, "what was sampled is what trains"
    assert offered_tools(group.prompt) == [TOOL]
    assert server.openai.chat.completions.retrieve(reply.id).choices == reply.choices
    body = server.chat(messages=ASK, tools=[TOOL], n=2).json()
    validate("CreateChatCompletionResponse", body)
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in body["choices"]]
    assert len(set(ids)) == 2


def test_the_conversation_goes_on_from_the_call(serve: Serve) -> None:
    server = serve(policy=Says(CALL))
    create = server.openai.chat.completions.create
    for user in (user_of(Pool.TRAIN), openai.omit):
        first = create(model=POLICY, messages=ASK, tools=[TOOL], n=2, user=user)
        called: Any = first.choices[1].message.model_dump(exclude_none=True)
        answer: Any = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "on its way"}
        further = create(model=POLICY, messages=[*ASK, called, answer], tools=[TOOL], user=user)
        group = server.group(further.id)
        assert (group.parent_group_id, group.parent_index) == (first.id, 1), "the call's id names the branch"
        assert isinstance(group.prompt, tuple)
        assert [turn.role for turn in spoken(group.prompt)] == ["user", "assistant", "tool"]
        shown = list(server.openai.chat.completions.messages.list(further.id))
        assert [(one.role, one.content) for one in shown] == [
            ("user", ASK[0]["content"]),
            ("assistant", None),
            ("tool", "on its way"),
        ]
        stranger = create(model=POLICY, messages=[*ASK, called, answer], tools=[TOOL], user="somebody else")
        assert server.group(stranger.id).parent_group_id is None


def test_content_beside_calls_and_what_is_no_call(serve: Serve) -> None:
    texts = [f"Let me look.\n\n{CALL}\n{OTHER_CALL}", "just text\n", '<tool_call>{"name": oops}</tool_call>']
    server = serve(policy=Says(*texts))
    both, plain, broken = server.openai.chat.completions.create(model=POLICY, messages=ASK, tools=[TOOL], n=3).choices
    assert (both.message.content, both.finish_reason) == ("Let me look.", "tool_calls")
    assert calls_of(both) == [("order_status", '{"order": 17}'), ("refund", "{}")]
    for choice, text in ((plain, texts[1]), (broken, texts[2])):
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


def test_without_tools_or_with_tool_choice_none_a_call_is_text(serve: Serve) -> None:
    server = serve(policy=Says(CALL))
    choices: list[dict[str, Any]] = [{}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}]
    for options in choices:
        reply = server.chat(messages=ASK, **options).json()
        assert reply["choices"][0]["message"] == {"role": "assistant", "content": CALL, "refusal": None}
        assert offered_tools(server.group(reply["id"]).prompt) == []


def test_parallel_tool_calls_false_ends_the_answer_with_the_first(serve: Serve) -> None:
    server = serve(policy=Says(CALL + OTHER_CALL))
    reply = server.openai.chat.completions.create(model=POLICY, messages=ASK, tools=[TOOL], parallel_tool_calls=False)
    assert calls_of(reply.choices[0]) == [("order_status", '{"order": 17}')]
    assert bytes(server.group(reply.id).completions[0].token_ids).decode() == CALL, "nothing was sampled behind it"


def test_a_call_that_was_cut_off_is_text_and_says_length(serve: Serve) -> None:
    server = serve(policy=Says(CALL))
    reply = server.openai.chat.completions.create(model=POLICY, messages=ASK, tools=[TOOL], max_tokens=30)
    assert (reply.choices[0].finish_reason, reply.choices[0].message.tool_calls) == ("length", None)
    assert reply.choices[0].message.content == CALL[:30]


TEXTS = [CALL, f"Let me look.\n\n{CALL}\n{OTHER_CALL}\n", "just text\n", "<tool_", f"a {OTHER_CALL} b", "<tool_call>no", "é \n"]


@pytest.mark.parametrize("parallel", [None, False])
def test_a_stream_says_what_the_whole_answer_says(serve: Serve, parallel: bool | None) -> None:
    server = serve(policy=Says(*TEXTS))
    options: dict[str, Any] = {"messages": ASK, "tools": [TOOL], "n": len(TEXTS), "parallel_tool_calls": parallel}
    options["logprobs"] = True
    chunks = sse_chunks(server.chat(**options, stream=True).text)
    whole = server.http.get(f"/v1/chat/completions/{chunks[0]['id']}").json()["choices"]
    group = server.group(chunks[0]["id"])
    for chunk in chunks:
        validate("CreateChatCompletionStreamResponse", chunk)
    for index, said in enumerate(whole):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["delta"].get("role") for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        content = "".join(choice["delta"].get("content") or "" for choice in mine)
        assert (content or None) == said["message"]["content"]
        calls: dict[int, dict[str, Any]] = {}
        for choice in mine:
            for call in choice["delta"].get("tool_calls", []):
                kept = calls.setdefault(call["index"], {"arguments": ""})
                kept.setdefault("id", call.get("id"))
                kept.setdefault("name", call["function"].get("name"))
                kept["arguments"] += call["function"]["arguments"]
        told = [{"id": one["id"], **one["function"]} for one in said["message"].get("tool_calls", [])]
        assert list(calls.values()) == [{"arguments": one["arguments"], "id": one["id"], "name": one["name"]} for one in told]
        assert [choice["finish_reason"] for choice in mine][-1] == said["finish_reason"]
        tokens = "".join(entry["token"] for choice in mine for entry in choice.get("logprobs", {}).get("content", []))
        assert tokens.encode(errors="replace") == group.completions[index].text.encode(errors="replace")


def test_the_clients_own_stream_puts_a_call_together(serve: Serve) -> None:
    server = serve(policy=Says(CALL))
    with server.openai.chat.completions.stream(model=POLICY, messages=ASK, tools=[TOOL]) as stream:
        final = stream.get_final_completion()
    call = (final.choices[0].message.tool_calls or [])[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("order_status", {"order": 17})
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_duel_with_tools_stays_blind(serve: Serve) -> None:
    server = serve(policy=Says(CALL, "text"))
    server.add_version(1)
    server.open_duel(1)
    reply = server.chat(messages=ASK, tools=[TOOL], n=2, user=user_of(Pool.GATE))
    assert reply.status_code == 200
    assert "@" not in reply.text


class WithoutTools(FakeTokens):
    @property
    def has_tools(self) -> bool:
        return False


class SaysWithoutTools(Says):
    @property
    def tokens(self) -> FakeTokens:
        return WithoutTools()


CALLED = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
ANSWERED = {"role": "tool", "tool_call_id": "a", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"messages": [*ASK, CALLED]}, "messages"),
        ({"messages": [*ASK, CALLED, ANSWERED]}, "messages"),
    ],
)
def test_a_template_without_tools_refuses_them_by_name(serve: Serve, fields: dict[str, Any], param: str) -> None:
    server = serve(policy=SaysWithoutTools("hello"))
    for stream in (False, True):
        refused = server.http.post("/v1/chat/completions", json=chat_body(**fields, stream=stream))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert server.chat(tools=[TOOL], tool_choice="none").status_code == 200, "then they are not asked for"


# --- the reader alone


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*TEXTS, "<", "tool_call>", "</tool_call>", "\n", '{"name": "f"}', "x"]), max_size=6), st.data()
)
def test_however_the_text_is_cut_the_same_is_read(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    whole = read_answer(FakeTokens(), (), [], Completion(text))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    reader = CallReader(FakeTokens(), (), [])
    said = [piece for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for piece in reader.feed(text[a:b])]
    said += reader.finish(is_cut=False)
    assert ("".join(piece.content for piece in said) or None) == whole.content
    assert tuple(piece for piece in said if piece.name is not None) == whole.calls
    if not whole.calls:
        assert (whole.content or "") == text, "an answer without calls is its text"


QWEN = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\[CALL (?P<name>\w+)\]",
            "close": "[/CALL]",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


class OwnTemplate(FakeTokens):
    """A model that says itself how its answers are read, and whose end token has a text."""

    @property
    def response_template(self) -> Any:
        return QWEN

    def decode(self, token_ids: Any, *, special: bool = False) -> str:
        text = super().decode([token for token in token_ids if token != EOS])
        return f"{text}<|im_end|>" if special and EOS in token_ids else text


class SaysItsOwnWay(Says):
    @property
    def tokens(self) -> FakeTokens:
        return OwnTemplate()


@pytest.mark.parametrize("stream", [False, True])
def test_a_models_own_response_template_is_used(serve: Serve, stream: bool) -> None:
    server = serve(policy=SaysItsOwnWay('<think>hm</think>Sure.[CALL f]{"a": "é"}[/CALL]'))
    reply = server.chat(messages=ASK, tools=[TOOL], stream=stream)
    if stream:
        chunks = sse_chunks(reply.text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Sure."
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
        reply = server.http.get(f"/v1/chat/completions/{chunks[0]['id']}")
    (choice,) = reply.json()["choices"]
    assert choice["message"]["content"] == "Sure."
    assert choice["message"]["reasoning_content"] == "hm"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": "é"}'}
    one = server.chat(messages=ASK, tools=[TOOL], parallel_tool_calls=False).json()
    assert server.group(one["id"]).sampling.stop == ("[/CALL]",)


def test_what_a_models_template_cannot_read_is_content(serve: Serve) -> None:
    server = serve(policy=SaysItsOwnWay("Sure.[CALL f]not json[/CALL]"))
    choice = server.chat(messages=ASK, tools=[TOOL]).json()["choices"][0]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("stop", False)
    assert choice["message"]["content"].startswith("Sure.[CALL f]not json[/CALL]")


@settings(deadline=None)
@given(st.integers(0, 127), st.integers(0, 255))
def test_a_calls_id_holds_its_answer(index: int, place: int) -> None:
    group_id = new_group_id()
    made = call_id(group_id, index, place)
    assert call_origin(made) == (group_id, index)
    assert len(made) <= 40


@settings(deadline=None)
@given(st.text())
def test_other_ids_are_nobodys(text: str) -> None:
    assert call_origin(text) is None or text.startswith("call_")
    assert call_origin(f"call_{text}") is None or len(text) >= 24
