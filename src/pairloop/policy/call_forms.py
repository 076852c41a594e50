"""The forms in which models write tool calls, as response templates of transformers.

A model that carries a ``response_template`` of its own is read by that. Of the others the chat template tells the form: it
writes earlier calls the way the model was taught to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pairloop.policy.protocols import Tokens

CALLS, CONTENT = "tool_calls", "content"
_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_TEXT = {"content": "text"}


@dataclass(frozen=True, slots=True)
class CallForm:
    """``begins``: the text that begins a call. ``takes_special_tokens``: whether the template reads those, too."""

    begins: str
    template: Mapping[str, Any]
    takes_special_tokens: bool = False

    @property
    def ends(self) -> str | None:
        """The text that ends a call; None where it is not one plain text."""
        end = self.template["fields"].get(CALLS, {}).get("close")
        return end if isinstance(end, str) else None


def _form(begins: str, calls: Mapping[str, Any], **more: Any) -> CallForm:
    # The anchor is asked for by the parser and never looked for: these forms read no prompt.
    fields = {CALLS: {"repeats": True, **calls}, CONTENT: _TEXT}
    return CallForm(begins, {"start_anchor": begins, "fields": fields}, **more)


def _xml(tag: str) -> dict[str, Any]:
    return {"content": "xml-inline", "content_args": {"tag_pattern": tag, "value_parser": {"name": "text"}}, "transform": _CALL}


# Hermes, Qwen 2.5 and 3 and many others: <tool_call>{"name": ..., "arguments": {...}}</tool_call>
JSON_CALLS = _form(
    "<tool_call>",
    {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "content_args": {"allow_non_json": True}},
)
# Qwen 3.5 and later, Nemotron 3: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
XML_CALLS = _form(
    "<tool_call>",
    {
        "open_pattern": r"<tool_call>\s*<function=(?P<name>[^\n>]+)>",
        "close": "</tool_call>",
        **_xml(r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"),
    },
)
# GLM 4: <tool_call>name <arg_key>key</arg_key><arg_value>value</arg_value></tool_call>
KEYED_CALLS = _form(
    "<tool_call>",
    {
        "open_pattern": r"<tool_call>(?P<name>[^\s<]+)\n?",
        "close": "</tool_call>",
        **_xml(r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
    },
)
# Llama 3.1 and later: {"name": ..., "parameters": {...}} and the end of the turn
BARE_CALLS = _form(
    '{"name"',
    {
        "open_pattern": r'\{"name":\s*"(?P<name>[^"]+)",\s*"parameters":\s*',
        "close_pattern": r"\}\s*<\|e(?:ot|om)_id\|>",
        "content": "json",
        "transform": _CALL,
    },
    takes_special_tokens=True,
)


def form_of(tokens: Tokens) -> CallForm:
    """How this model writes its calls."""
    if tokens.response_template is not None:
        return CallForm("", tokens.response_template, takes_special_tokens=True)
    source = tokens.tool_template or ""
    if "<function=" in source:
        return XML_CALLS
    if "<arg_key>" in source:
        return KEYED_CALLS
    if "<tool_call>" not in source and '"parameters": ' in source and '{"name": "' in source:
        return BARE_CALLS
    return JSON_CALLS
