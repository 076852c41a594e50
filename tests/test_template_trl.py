"""Every chat template that TRL carries: rendered as by transformers; answered by the prefix rule, its exception, or refused."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.test_template import byte_tokenizer

from pairloop.errors import InvalidRequestError, ModelError
from pairloop.template import ChatTemplate
from pairloop.types import Message, ToolCall, with_tools

_SPEC = find_spec("trl")
FOLDER = Path(_SPEC.origin).parent / "chat_templates" if _SPEC is not None and _SPEC.origin else Path("none")
TEMPLATES = sorted(path.name for path in FOLDER.glob("*.jinja"))

pytestmark = pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")

SPECIAL = {"eos_token": "<|im_end|>", "bos_token": "<s>", "pad_token": "<|end|>"}
OPENS_THOUGHTS = ("deepseek_r1", "deepseekv3", "nemotron_3")
"""Whose generation prompt opens a block of thoughts that a finished chat does not have."""
REFUSES_SYSTEM = ("gemma.jinja", "gemma_training.jinja")
ANSWER = "Tomorrow, naïve ☂."
THOUGHTFUL = f"It was sent on Monday.\n</think>\n\n{ANSWER}"

ASKED = (Message("user", "Where is it?"),)
CHATS = {
    "one turn": ASKED,
    "several": (*ASKED, Message("assistant", "On its way."), Message("user", "When will it come?")),
    "system": (Message("system", "Be brief."), *ASKED),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "order_status",
        "description": "Where an order is.",
        "parameters": {"type": "object", "properties": {"number": {"type": "string", "description": "Its number."}}},
    },
}
CALL = ToolCall("call12345", "order_status", '{"number": "7"}')
WITH_TOOLS = with_tools(
    [TOOL],
    (*ASKED, Message("assistant", "", (CALL,)), Message("tool", "late", tool_call_id=CALL.id)),
)


@cache
def _load(name: str) -> ChatTemplate:
    source = (FOLDER / name).read_text(encoding="utf-8")
    return ChatTemplate(byte_tokenizer().to_str(), source, special_tokens=SPECIAL, origin=name)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_where_its_answer_goes_on_or_the_answer_is_refused(name: str) -> None:
    chat = _load(name)
    for kind, prompt in CHATS.items():
        if kind == "system" and name in REFUSES_SYSTEM:
            with pytest.raises(InvalidRequestError, match="not supported; put the system text into the first user turn") as no:
                chat.encode_prompt(prompt)
            assert no.value.param == "messages"
            continue
        assert all(message.content in chat.render(prompt) for message in prompt), "no turn is left out"
        if name.startswith(OPENS_THOUGHTS):
            with pytest.raises(ModelError, match=r"breaks the prefix rule: .*opens <think>.*an answer without </think>"):
                chat.encode_completion(prompt, ANSWER)
            ids = chat.encode_completion(prompt, THOUGHTFUL)
            assert (chat.decode(ids), ids[-1]) == (THOUGHTFUL, 258)
            continue
        whole = chat.render((*prompt, Message("assistant", ANSWER)), add_generation_prompt=False)
        suffix = chat.check_prefix(prompt, ANSWER)
        assert chat.render(prompt) + suffix == whole
        # What is learned is what the template writes, up to its closing words.
        learned = byte_tokenizer().decode(chat.encode_completion(prompt, ANSWER)[:-1], skip_special_tokens=False)
        assert suffix.startswith(learned)
        assert learned.endswith(ANSWER)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_are_shown_or_refused(name: str) -> None:
    chat = _load(name)
    if not chat.has_tools:
        with pytest.raises(InvalidRequestError, match="does not take tools") as no:
            chat.encode_prompt(WITH_TOOLS)
        assert no.value.param == "tools"
        return
    text = chat.render(WITH_TOOLS)
    assert "order_status" in text
    assert "late" in text


def test_most_templates_take_tools() -> None:
    assert sum(_load(name).has_tools for name in TEMPLATES) >= 40


@pytest.mark.parametrize("name", TEMPLATES)
def test_token_for_token_what_transformers_makes(name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    chat = _load(name)
    make: Any = PreTrainedTokenizerFast
    theirs = make(tokenizer_object=byte_tokenizer(), **SPECIAL)
    theirs.chat_template = (FOLDER / name).read_text(encoding="utf-8")
    prompts: dict[str, tuple[Message, ...]] = {**CHATS, **({"tools": WITH_TOOLS} if chat.has_tools else {})}
    for kind, prompt in prompts.items():
        turns = [_turn(message, parts=chat.reads_parts) for message in prompt if message.role != "tools"]
        tools = [TOOL] if kind == "tools" else None
        try:
            expected = theirs.apply_chat_template(turns, tools=tools, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # noqa: BLE001 - jinja's, or Python's own: what it refuses, we refuse
            with pytest.raises(InvalidRequestError):
                chat.encode_prompt(prompt)
            print(f"{name}: {kind}: refused: {error}")
            continue
        assert chat.encode_prompt(prompt) == tuple(expected), kind


def _turn(message: Message, *, parts: bool) -> dict[str, Any]:
    turn: dict[str, Any] = message.as_dict()
    for call in turn.get("tool_calls", ()):
        call["function"]["arguments"] = {"number": "7"}
    if parts:
        turn["content"] = [{"type": "text", "text": message.content}]
    return turn
