"""Answers that the local engine holds to a JSON schema: whole, valid, with the model's own log-probs, beside free ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server import POLICY, RunningServer
from tests.tiny_models import write_model

from pairloop.config import PolicySection
from pairloop.errors import InvalidRequestError
from pairloop.policy import constrained
from pairloop.policy.decoding import draw
from pairloop.policy.local import LocalPolicy
from pairloop.policy.protocols import RESPONSE_FORMAT, SampleRequest, TokenSequence
from pairloop.types import Completion, FinishReason, SamplingParams

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"order": {"type": "integer", "minimum": 0, "maximum": 99}, "state": {"enum": ["sent", "lost"]}},
    "required": ["order", "state"],
    "additionalProperties": False,
}
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPolicy]:
    folder = write_model(tmp_path_factory.mktemp("bytes"))
    local = LocalPolicy(folder, PolicySection(model=str(folder), max_batch=16))
    yield local
    local.close()


def ask(policy: LocalPolicy, form: dict[str, Any] | None, n: int = 4, **params: Any) -> tuple[Completion, ...]:
    sampling = SamplingParams(**{"max_tokens": 120, **params})
    return policy.sample(SampleRequest(PROMPT, 0, n, sampling, response_format=form)).result(timeout=60)


@pytest.mark.parametrize("params", [{"seed": 1}, {"temperature": 0.0}, {"seed": 2, "temperature": 1.5, "top_p": 0.8}])
def test_every_answer_is_whole_and_follows_the_schema(policy: LocalPolicy, params: dict[str, Any]) -> None:
    assert RESPONSE_FORMAT in policy.abilities
    for answer in ask(policy, FORMAT, **params):
        assert answer.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    for answer in ask(policy, None, **params):
        with pytest.raises(json.JSONDecodeError):  # left alone, the model writes no JSON
            json.loads(answer.text)


def test_the_log_probs_stay_the_models_own(policy: LocalPolicy) -> None:
    answers = ask(policy, FORMAT, seed=3)
    scored = policy.logps(0, [TokenSequence(PROMPT, answer.token_ids) for answer in answers])
    for answer, logps in zip(answers, scored, strict=True):
        torch.testing.assert_close(torch.tensor(answer.logps), torch.tensor(logps), atol=1e-4, rtol=0)


def test_free_rows_draw_what_they_draw_alone(policy: LocalPolicy) -> None:
    alone = ask(policy, None, seed=5)
    params = SamplingParams(max_tokens=120, seed=5)
    waiting = [policy.sample(SampleRequest(PROMPT, 0, 4, params, response_format=form)) for form in (FORMAT, None, FORMAT)]
    held, free, again = (future.result(timeout=60) for future in waiting)
    assert [answer.token_ids for answer in free] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in held] == [answer.text for answer in again]


def test_an_answer_that_is_cut_says_length(policy: LocalPolicy) -> None:
    assert {answer.finish_reason for answer in ask(policy, FORMAT, max_tokens=5, seed=1)} == {FinishReason.LENGTH}


def test_a_json_object_is_any_object(policy: LocalPolicy) -> None:
    whole = [
        answer for answer in ask(policy, {"type": "json_object"}, n=16, seed=4) if answer.finish_reason is FinishReason.STOP
    ]
    assert whole
    assert all(isinstance(json.loads(answer.text), dict) for answer in whole)


@pytest.mark.parametrize("schema", [{"type": "objct"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}])
def test_a_schema_that_cannot_be_held_to_is_refused(policy: LocalPolicy, schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be held to") as refused:
        ask(policy, {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert refused.value.param == "response_format"
    assert ask(policy, FORMAT, n=1)[0].text, "and the engine goes on"


def test_without_the_extra_the_engine_says_that_it_cannot(policy: LocalPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrained, "EXTRA", "a_package_that_is_not_there")
    assert RESPONSE_FORMAT not in policy.abilities


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]), top_p=st.sampled_from([0.1, 1.0]))
def test_what_is_not_allowed_is_never_drawn(seed: int, temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(4, 100, generator=generator) * 20
    allowed_BV = torch.rand(4, 100, generator=generator) < 0.05
    allowed_BV[:, 7] = True
    uniforms = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    tokens_B, logps_B = draw(logits_BV, uniforms, [temperature] * 4, [top_p] * 4, allowed_BV)
    assert allowed_BV.gather(1, tokens_B[:, None]).all()
    raw = logits_BV.double().log_softmax(-1).gather(1, tokens_B[:, None])[:, 0]
    torch.testing.assert_close(logps_B.double(), raw, atol=1e-3, rtol=0)
    free, _ = draw(logits_BV, uniforms, [temperature] * 4, [top_p] * 4)
    everything, _ = draw(logits_BV, uniforms, [temperature] * 4, [top_p] * 4, torch.ones_like(allowed_BV))
    assert torch.equal(free, everything)


def test_over_http_with_the_official_client(serve: Callable[..., RunningServer], policy: LocalPolicy) -> None:
    server = serve(policy=policy)
    messages: Any = [{"role": "user", "content": "Where is my order?"}]
    asked: Any = {"model": POLICY, "messages": messages, "response_format": FORMAT, "max_completion_tokens": 120}
    reply = server.openai.chat.completions.create(**asked, n=2)
    for choice in reply.choices:
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    assert server.group(reply.id).sampling.is_tempered
    text = "".join(
        chunk.choices[0].delta.content or "" for chunk in server.openai.chat.completions.create(**asked, stream=True)
    )
    jsonschema.validate(json.loads(text), SCHEMA)
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}}
    for stream in (False, True):
        refused = server.chat(response_format=bad, stream=stream)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
