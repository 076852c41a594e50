"""What a real vLLM said, read back; and what no engine should say, refused without a crash."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.record_vllm import exchanges
from tests.vllm_server import recorded, recorded_events

from pairloop.errors import EngineError, InvalidRequestError, ModelError
from pairloop.policy import agreement
from pairloop.policy.protocols import SampleRequest, TokenEvent
from pairloop.policy.remote.assembly import Assembly
from pairloop.policy.remote.breaker import FAILURES, Breaker, Circuit
from pairloop.policy.remote.probe import measure, verdict
from pairloop.policy.remote.wire import GarbageError, Piece, ReplicaUnavailableError, Token, read_chunk, read_models
from pairloop.starter import MODEL_DIR
from pairloop.template import ChatTemplate
from pairloop.types import Completion, FinishReason, SamplingParams

TOKENS = ChatTemplate.load(MODEL_DIR)
VOCAB = 1_000


def request_of(name: str, *, top: int = 0, **options: Any) -> SampleRequest:
    body = recorded(name)["request"]["json"]
    params = SamplingParams(body["max_tokens"], body["temperature"], body["top_p"], tuple(body["stop"]))
    return SampleRequest(tuple(body["prompt"]), 3, body["n"], params, top_logprobs=top, **options)


def replay(name: str, *, top: int = 0) -> tuple[tuple[Completion, ...], list[TokenEvent]]:
    """The completions and token events of a recorded stream."""
    events: list[TokenEvent] = []
    request = request_of(name, top=top, on_token=events.append)
    assembly = Assembly(request, TOKENS)
    for data in recorded_events(name):
        for piece in read_chunk(data, request, n=assembly.asked, vocab_size=VOCAB):
            assembly.add(piece)
    return assembly.completions(recorded=True), events


def engine_text(name: str, index: int) -> str:
    choices = [choice for data in recorded_events(name) for choice in json.loads(data)["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


@pytest.mark.parametrize("name", ["two", "top", "eos", "stop", "bytes", "adapter"])
def test_a_recorded_stream_gives_the_engine_s_tokens_log_probs_and_text(name: str) -> None:
    completions, events = replay(name)
    for index, completion in enumerate(completions):
        mine = [event for event in events if event.index == index]
        assert tuple(event.token_id for event in mine) == completion.token_ids
        assert tuple(event.logp for event in mine) == completion.logps
        assert all(logp <= 0 for logp in completion.logps)
        assert "".join(event.text for event in mine) == completion.text
        assert completion.version == 3
        if name != "bytes":
            assert completion.text == engine_text(name, index)


def test_the_answer_s_end_is_told_as_the_local_engine_tells_it() -> None:
    (ended,), _ = replay("eos")
    assert ended.finish_reason is FinishReason.STOP
    assert ended.token_ids[-1] in TOKENS.eos_token_ids
    (stopped,), _ = replay("stop")
    assert stopped.finish_reason is FinishReason.STOP
    assert "order" not in stopped.text
    assert TOKENS.decode(stopped.token_ids).endswith("order"), "the tokens of the stop string were sampled, and stay"
    cut, _ = replay("two")
    assert [c.finish_reason for c in cut] == [FinishReason.LENGTH] * 2
    assert not TOKENS.eos_token_ids & {c.token_ids[-1] for c in cut}


def test_bytes_inside_a_character_add_no_text_of_their_own() -> None:
    (completion,), events = replay("bytes")
    assert any(event.text == "" for event in events[:-1])
    assert completion.text == TOKENS.decode(completion.token_ids)


def test_the_likeliest_tokens_come_by_id_and_in_order() -> None:
    _, events = replay("top", top=3)
    for event in events:
        logps = [top.logp for top in event.top]
        assert len(logps) == 3
        assert logps == sorted(logps, reverse=True)
        sampled = next((top for top in event.top if top.token_id == event.token_id), None)
        assert sampled is None or sampled.text == event.text
        if event.logp > logps[-1]:
            assert (event.token_id, event.logp) in {(top.token_id, top.logp) for top in event.top}


def test_errors_inside_a_stream_say_whose_fault_it_is() -> None:
    for name in ("bad_schema", "bad_token"):
        with pytest.raises(InvalidRequestError, match=r"the engine refuses the request: .*(nonsense|99999)"):
            read_chunk(recorded_events(name)[0], request_of(name), n=1, vocab_size=VOCAB)
    with pytest.raises(ReplicaUnavailableError, match="broke off: the engine core died"):
        read_chunk('{"error": {"message": "the engine core died", "code": 500}}', request_of("two"), n=2, vocab_size=VOCAB)


def test_what_is_asked_today_is_what_was_recorded() -> None:
    """A body that changes must be recorded anew: python -m tests.record_vllm."""
    asked = exchanges(MODEL_DIR, "/adapters")
    assert asked
    for name, (method, path, body) in asked.items():
        assert recorded(name)["request"] == {"method": method, "path": path, "json": json.loads(json.dumps(body))}, name


def test_the_list_of_models_tells_the_base_from_its_adapters() -> None:
    bare, whole = (json.loads(recorded(name)["response"]["body"]) for name in ("models_base", "models_adapter"))
    assert read_models(bare, None).base == "tiny"
    assert read_models(bare, None).max_model_len == 512
    assert not read_models(bare, None).adapters
    assert read_models(whole, "tiny").adapters == {"bot--v1-00000001"}
    with pytest.raises(
        GarbageError, match=r"no model 'other' \(policy.engine_model\); it lists \['bot--v1-00000001', 'tiny'\]"
    ):
        read_models(whole, "other")
    with pytest.raises(GarbageError, match="without max_model_len"):
        read_models({"data": [{"id": "x", "parent": None}]}, None)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_garbage_in_any_place_is_an_error_of_ours(data: st.DataObject) -> None:
    chunk = json.loads(data.draw(st.sampled_from(recorded_events("top"))))
    spot: Any = chunk
    while True:
        key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
        if not (isinstance(spot[key], dict | list) and spot[key]) or data.draw(st.booleans()):
            break
        spot = spot[key]
    spot[key] = data.draw(anything)
    request = request_of("top", top=3)
    assembly = Assembly(request, TOKENS)
    try:
        for piece in read_chunk(json.dumps(chunk), request, n=2, vocab_size=VOCAB):
            assert all(0 <= token.token_id < VOCAB and math.isfinite(token.logp) for token in piece.tokens)
            assembly.add(piece)
    except (EngineError, InvalidRequestError):
        pass


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        ({"index": 2}, "index 2 where 2"),
        ({"token_ids": [5_000]}, "token id 5000 where the vocabulary has 1000"),
        ({"token_ids": [1, 2]}, "2 token ids with 1 log-probs"),
        ({"logprobs": None}, "logprobs is not an object"),
        ({"prompt_token_ids": [9]}, "another prompt"),
    ],
)
def test_each_kind_of_garbage_is_named(spoilt: dict[str, Any], reason: str) -> None:
    chunk = json.loads(recorded_events("two")[0])
    chunk["choices"][0] |= spoilt
    with pytest.raises(GarbageError, match=reason):
        read_chunk(json.dumps(chunk), request_of("two"), n=2, vocab_size=VOCAB)


def test_a_log_prob_that_is_no_number_is_garbage() -> None:
    for bad in ("NaN", "Infinity", '"-1"', "true", "null"):
        chunk = json.loads(recorded_events("two")[0])
        chunk["choices"][0]["logprobs"]["token_logprobs"] = ["HERE"]
        with pytest.raises(GarbageError, match="log-prob"):
            read_chunk(json.dumps(chunk).replace('"HERE"', bad), request_of("two"), n=2, vocab_size=VOCAB)


def test_a_completion_is_whole_or_refused() -> None:
    request = request_of("two")
    assembly = Assembly(request, TOKENS)
    assembly.add(Piece(0, (Token(5, -1.0),), "stop"))
    with pytest.raises(GarbageError, match="before 1 of 2 completions did"):
        assembly.completions(recorded=True)
    with pytest.raises(GarbageError, match="goes on after its end"):
        assembly.add(Piece(0, (Token(5, -1.0),), None))
    with pytest.raises(GarbageError, match="ended without a token"):
        assembly.add(Piece(1, (), "length"))
    with pytest.raises(ReplicaUnavailableError, match=r"gave the request up \(abort\)"):
        assembly.add(Piece(1, (), "abort"))


def test_log_probs_under_a_response_format_are_not_kept() -> None:
    """The engine tells those of what the format left over: seen 20 nats away from the policy's own."""
    request = request_of("two", response_format={"type": "json_object"})
    assembly = Assembly(request, TOKENS)
    for index in range(2):
        assembly.add(Piece(index, (Token(5, -1.0),), "stop"))
    assert [completion.logps for completion in assembly.completions(recorded=True)] == [(), ()]


# -- the breaker ------------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_circuit_opens_pauses_and_lets_one_through() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock, rng=random.Random(0))
    for _ in range(FAILURES):
        assert breaker.admits
        assert not breaker.begin()
        breaker.failed()
    assert breaker.state is Circuit.OPEN
    assert not breaker.admits
    clock.now += 1.5
    assert breaker.begin(), "half-open: this one is on trial"
    assert not breaker.admits, "one on trial at a time"
    breaker.gave_up()
    assert breaker.admits, "a trial whose client went away says nothing"
    assert breaker.begin()
    breaker.failed()
    assert breaker.state is Circuit.OPEN
    clock.now += 0.99
    assert breaker.state is Circuit.OPEN, "the second pause is longer"
    clock.now += 2.01
    assert breaker.begin()
    breaker.succeeded()
    assert breaker.state is Circuit.CLOSED
    assert breaker.admits


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["begin", "ok", "bad", "gone", "wait"]), max_size=60), st.integers(0, 9))
def test_a_breaker_never_has_two_on_trial_and_never_stays_open(steps: list[str], seed: int) -> None:
    clock = Clock()
    breaker = Breaker(clock=clock, rng=random.Random(seed))
    trial = False
    running = 0
    for step in steps:
        if step == "begin" and breaker.admits:
            on_trial = breaker.begin()
            assert not (on_trial and trial)
            trial = trial or on_trial
            running += 1
        elif step in ("ok", "bad", "gone") and running:
            {"ok": breaker.succeeded, "bad": breaker.failed, "gone": breaker.gave_up}[step]()
            trial = False
            running -= 1
        elif step == "wait":
            clock.now += 0.4
    clock.now += 60.0
    if not trial:
        assert breaker.admits


# -- what the probes say ----------------------------------------------------------------------------------------------------

REPORT = {"token_tolerance": 1e-4, "max_token_delta": 5e-6}
IDS = (1, 2, 3)
BASE, ADAPTER = (-1.0, -0.5, -0.1), (-1.2, -0.4, -0.1)


def test_an_adapter_s_own_log_probs_pass_and_so_does_one_that_changes_nothing() -> None:
    noisy = tuple(logp + 4e-6 for logp in ADAPTER)
    verdict(noisy, (IDS, BASE), IDS, ADAPTER, BASE, REPORT)
    verdict(BASE, (IDS, BASE), IDS, BASE, BASE, REPORT)


def test_the_base_in_disguise_is_found_out_also_by_a_noisy_engine() -> None:
    with pytest.raises(EngineError, match=r"the base's log-probs to the last bit, where the adapter moves them by 0.2"):
        verdict(BASE, (IDS, BASE), IDS, ADAPTER, BASE, REPORT)
    with pytest.raises(EngineError, match=r"are the base's: up to 0.2 nats"):
        verdict(BASE, ((9,), (-1.0,)), IDS, ADAPTER, BASE, REPORT)
    noisy = {"token_tolerance": 0.03, "max_token_delta": 0.2}
    with pytest.raises(EngineError, match="to the last bit"):
        verdict(BASE, (IDS, BASE), IDS, ADAPTER, BASE, noisy)
    with pytest.raises(EngineError, match="of other weights"):
        verdict((-1.4, -0.3, -0.1), (IDS, BASE), IDS, ADAPTER, BASE, REPORT)


def test_agreement_is_the_learner_s_own_rule() -> None:
    theirs = [[Completion("", IDS, BASE), Completion("", IDS, BASE)]]
    near = [[tuple(logp + 2e-5 for logp in BASE), BASE]]
    assert measure(theirs, near, "float32")["passed"] is True
    off = [[tuple(logp + 0.02 for logp in BASE), BASE]]
    assert measure(theirs, off, "float32")["passed"] is False
    assert measure(theirs, [[tuple(logp + 0.02 for logp in BASE)] * 2], "bfloat16")["passed"] is True
    assert measure(theirs, off, "bfloat16")["passed"] is False, "three times .02 nats in one answer make a margin of .06"
    with pytest.raises(ModelError, match="other weights"):
        measure(theirs, [[(-3.0, -3.0, -3.0), BASE]], "float32")
    assert agreement.report([], "float32") == {"passed": None, "checked": 0}
    assert agreement.report([[[0.0, math.nan]]], "float32")["passed"] is False


def test_recordings_name_no_machine() -> None:
    for path in (Path(__file__).parent / "recorded" / "vllm").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "/tmp" not in text
        assert "/home" not in text
