"""Calls are read back from the text that the model's own chat template writes, for the templates that TRL carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl
import trl.chat_template_utils as theirs
from tests.tiny_models import byte_tokenizer
from tokenizers import AddedToken, Tokenizer

from pairloop.policy.call_forms import BARE_CALLS, JSON_CALLS, KEYED_CALLS, XML_CALLS, CallForm, form_of
from pairloop.policy.calls import read_answer
from pairloop.template import ChatTemplate
from pairloop.types import Completion, FinishReason, Message, ToolCall, with_tools

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOL = {
    "type": "function",
    "function": {
        "name": "order_status",
        "description": "Where an order is.",
        "parameters": {"type": "object", "properties": {"order": {"type": "integer"}, "note": {"type": "string"}}},
    },
}
ARGUMENTS = {"order": 17, "note": "is it 5 < 6?\nYes"}
ASK = (Message("user", "Where is order 17?"),)
SPECIAL = ("<|im_end|>", "<|eot_id|>", "<|user|>", "<|endoftext|>")

FORMS: dict[str, CallForm] = {
    "qwen2_5": JSON_CALLS,
    "qwen3": JSON_CALLS,
    "qwen3_instruct_2507": JSON_CALLS,
    "qwen3_vl": JSON_CALLS,
    "qwen3_5_nothink": XML_CALLS,
    "qwen3_5_think": XML_CALLS,
    "qwen3_6": XML_CALLS,
    "qwen3_8": XML_CALLS,
    "nemotron_3_nano": XML_CALLS,
    "nemotron_3_super": XML_CALLS,
    "glm4moe": KEYED_CALLS,
    "llama3_1": BARE_CALLS,
    "llama3_2": BARE_CALLS,
}
OWN = {"gptoss": theirs.gptoss_template, "gemma4": theirs.gemma4_template, "qwen3": theirs.qwen3_template}


def tokens_of(name: str, response_template: dict[str, Any] | None = None) -> ChatTemplate:
    tokenizer: Tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    special = {"eos_token": "<eos>", "bos_token": "<s>"}
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(tokenizer.to_str(), source, special_tokens=special, response_template=response_template)


def written(tokens: ChatTemplate) -> str:
    """What the template writes where a model has made the call, behind the prompt that the model was given."""
    prompt = with_tools([TOOL], ASK)
    call = ToolCall("call_1", "order_status", '{"order": 17, "note": "is it 5 < 6?\\nYes"}')
    whole = tokens.render((*prompt, Message("assistant", "", (call,))), add_generation_prompt=False)
    before = tokens.render(prompt)
    for shorter in (before, tokens.render(prompt, add_generation_prompt=False)):
        if whole.startswith(shorter):
            return whole.removeprefix(shorter)
    raise AssertionError("the template breaks the prefix rule")


def completion(tokens: ChatTemplate, text: str, reason: FinishReason = FinishReason.STOP) -> Completion:
    ids = tuple(tokens.tokenizer.encode(text, add_special_tokens=False).ids)
    return Completion(tokens.decode(ids), ids, (0.0,) * len(ids), 0, reason)


@pytest.mark.parametrize("name", FORMS)
def test_a_call_is_read_back_as_the_template_writes_it(name: str) -> None:
    tokens = tokens_of(name)
    assert form_of(tokens) is FORMS[name]
    read = read_answer(tokens, (), [TOOL], completion(tokens, written(tokens)))
    (call,) = read.calls
    assert call.name == "order_status"
    assert json.loads(call.arguments) == ARGUMENTS
    assert "tool_call" not in (read.content or "")


@pytest.mark.parametrize("name", FORMS)
def test_a_call_cut_by_its_length_is_content(name: str) -> None:
    tokens = tokens_of(name)
    text = written(tokens)
    at = text.index("order_status") + len("order_status") + 12
    read = read_answer(tokens, (), [TOOL], completion(tokens, text[:at], FinishReason.LENGTH))
    assert read.calls == ()
    assert "order_status" in (read.content or "")


@pytest.mark.parametrize("name", FORMS)
def test_plain_answers_stay_as_they_are(name: str) -> None:
    tokens = tokens_of(name)
    for text in ("It is on its way.", '{"an": "object"}', "5 < 6 and <b>", "{", " \n"):
        read = read_answer(tokens, (), [TOOL], completion(tokens, text))
        assert (read.content, read.calls) == (text, ())


@pytest.mark.parametrize("name", OWN)
def test_a_response_template_that_the_model_carries_comes_first(name: str) -> None:
    tokens = tokens_of(name, OWN[name])
    prompt = tokens.encode_prompt(with_tools([TOOL], ASK))
    read = read_answer(tokens, prompt, [TOOL], completion(tokens, written(tokens)))
    assert [call.name for call in read.calls] == ["order_status"]


def test_the_form_check_can_fail() -> None:
    tokens = tokens_of("qwen3_5_think")
    wrong = tokens_of("qwen3")
    assert read_answer(wrong, (), [TOOL], completion(tokens, written(tokens))).calls == ()
