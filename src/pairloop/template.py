"""Chats to token ids and back: the model's own chat template (jinja2, sandboxed) and its tokenizer.json, nothing else.

What is encoded how:

- a conversation is rendered by the template and encoded without further special tokens; a control token that someone typed
  into a message is encoded as plain text, so no user can open or close a turn;
- a plain string prompt is encoded as it is, behind the tokenizer's own leading special tokens (BOS) where it adds any;
- a completion is encoded separately from its prompt, as plain text, and its end-of-sequence token follows. That is what the
  sampler draws: it starts after the last prompt token, so no token spans the border, and ``encode_completion`` of a decoded
  completion gives its ids back wherever the tokenizer's own segmentation was sampled;
- some templates write something between the prompt and an answer (``<|channel|>final<|message|>``, an empty block of thoughts):
  a text that does not bring that along gets it in front, as the template has it.

Nothing is ever cut at ``len(prompt)``: the rendered prompt must be the beginning of the rendered chat with its answer, or the
model would be trained on another context than the one it is served with. One exception has a rule. Reasoning models
(deepseek-r1, deepseek-v3, nemotron-3) open a block of thoughts in the generation prompt and leave it out of a finished chat.
The sampler sees the opened block, so an answer that closes it (``…</think>…``, which is what such a model samples) is trained
right there, behind the prompt as it was served. An answer that does not close it would be learned as a thought: it is refused.

A template that refuses a turn (a system turn, say) is not talked around: the error names ``messages``. A template that reads
contents only as lists of parts gets its texts as ``[{"type": "text", "text": …}]``; a plain string it would leave out in
silence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pairloop.errors import InvalidRequestError, ModelError
from pairloop.types import Message, Prompt, messages_as_dicts, offered_tools

LFS_POINTER = b"version https://git-lfs"

# Private-use characters around control tokens that were typed into a message; they never leave this module.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"

_PROBE = "\ue0f2"
"""Stands for a text where it only matters what a template writes around it."""

_OPENED = re.compile(r"<(\w+)>\s*\Z")
"""The block that a generation prompt leaves open."""


class ChatTemplate:
    """One model's chat template and tokenizer; implements `pairloop.policy.protocols.Tokens`. Safe to use from any thread."""

    def __init__(
        self,
        tokenizer_json: str,
        template: str | None,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        tool_template: str | None = None,
        response_template: Mapping[str, Any] | None = None,
        origin: str = "model",
    ) -> None:
        self._tokenizer = _tokenizer(tokenizer_json, origin)
        # A second copy reads control tokens as plain text: the switch is a property of the tokenizer, not of the call.
        self._plain = _tokenizer(tokenizer_json, origin)
        self._plain.encode_special_tokens = True
        self.special_tokens = dict(special_tokens or {})
        self._source = template
        self._template = _compiled(template, origin) if template is not None else None
        offering = tool_template or (template if template is not None and _reads_tools(template) else None)
        self._tool_source = offering
        self._tool_template = _compiled(offering, origin) if offering is not None else None
        self.response_template = response_template
        """How the model's own configuration reads answers with tool calls (transformers' ``response_template``), if it does."""
        self._origin = origin
        ids = [self._tokenizer.token_to_id(self.special_tokens["eos_token"])] if "eos_token" in self.special_tokens else []
        self._eos = tuple(dict.fromkeys(i for i in (*ids, *eos_token_ids) if i is not None))
        if not self._eos:
            raise ModelError(f"{origin}: no end-of-sequence token: set eos_token in tokenizer_config.json")
        control = sorted((t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special), key=len)
        self._control = re.compile("|".join(map(re.escape, reversed(control)))) if control else None
        probe, plain = self._tokenizer.encode("a").ids, self._tokenizer.encode("a", add_special_tokens=False).ids
        self._leading = tuple(probe[: next((i for i in range(len(probe)) if probe[i : i + len(plain)] == plain), 0)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Can be handed to another process, which makes it again."""
        make = partial(
            ChatTemplate,
            special_tokens=self.special_tokens,
            eos_token_ids=self._eos,
            tool_template=self._tool_source,
            response_template=self.response_template,
            origin=self._origin,
        )
        return make, (self._tokenizer.to_str(), self._source)

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate:
        """Read a Hugging Face model directory; ModelError with the reason where it cannot be used."""
        path = model_dir / "tokenizer.json"
        text = _read(path)
        if text is None:
            raise ModelError(f"{model_dir}: tokenizer.json is missing; save the model's fast tokenizer beside its weights")
        config = _read_json(model_dir / "tokenizer_config.json")
        special = _special_tokens(model_dir, config)
        eos: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = _read_json(model_dir / name).get("eos_token_id")
            eos += [value] if isinstance(value, int) else list(value or ())
        template, tool_template = _template_sources(model_dir, config)
        return cls(
            text,
            template,
            special_tokens=special,
            eos_token_ids=eos,
            tool_template=tool_template,
            response_template=config.get("response_template"),
            origin=str(model_dir),
        )

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @property
    def has_tools(self) -> bool:
        """Whether the template writes the tools that a conversation offers."""
        return self._tool_template is not None

    @property
    def tool_template(self) -> str | None:
        return self._tool_source

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(self._eos)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def hash(self) -> str:
        """Changes whenever template, vocabulary or special tokens change."""
        parts = [
            self._tokenizer.to_str(),
            self._source or "",
            *self._own_tool_source(),
            json.dumps(self.special_tokens, sort_keys=True),
            repr(self._eos),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def render(self, prompt: Prompt, *, add_generation_prompt: bool = True) -> str:
        """The text that the model reads; a string is its own rendering. InvalidRequestError where the template refuses."""
        if isinstance(prompt, str):
            return prompt
        return self._render(_turns(prompt), offered_tools(prompt), add_generation_prompt)

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of the prompt with the generation prompt; InvalidRequestError (``messages``) where that is impossible."""
        if isinstance(prompt, str):
            ids = (*self._leading, *self._tokenizer.encode(prompt, add_special_tokens=False).ids)
        else:
            turns, tools = self._marked(_turns(prompt)), self._marked(offered_tools(prompt))
            ids = self._encode_marked(self._render(turns, tools, add_generation_prompt=True))
        if not ids:
            raise InvalidRequestError("the prompt has no tokens; write at least one character", param="messages")
        return ids

    def encode_completion(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Token ids of ``text`` as the answer to ``prompt``, then the end-of-sequence token; ModelError: see `check_prefix`."""
        suffix = self.check_prefix(prompt, text)
        preface = "" if isinstance(prompt, str) else self._preface(prompt, text, suffix)
        if preface:
            ids = self._encode_marked(preface + self._mark(text))
        else:
            ids = tuple(self._plain.encode(text, add_special_tokens=False).ids)
        return (*ids, self._closing(suffix))

    def check_prefix(self, prompt: Prompt, text: str) -> str:
        """What the template writes behind the prompt in the chat with its answer; ModelError where it breaks the prefix rule.

        The rule and its one exception stand at the top of this file.
        """
        if isinstance(prompt, str):
            return text
        before, whole = self.render(prompt), self._answered(prompt, text)
        if whole.startswith(before):
            return whole[len(before) :]
        bare = self.render(prompt, add_generation_prompt=False)
        opened = _OPENED.search(before.removeprefix(bare)) if before.startswith(bare) and whole.startswith(bare) else None
        if opened is None:
            at = next(i for i, c in enumerate(before) if whole[i : i + 1] != c)
            raise ModelError(
                f"{self._origin}: the chat template breaks the prefix rule: the rendered prompt is not the beginning of the "
                f"rendered chat with its answer (they part at character {at}: {before[at : at + 24]!r} against "
                f"{whole[at : at + 24]!r}); use a template that renders earlier turns alike with and without the answer"
            )
        closing = f"</{opened[1]}>"
        if closing not in text:
            raise ModelError(
                f"{self._origin}: the chat template breaks the prefix rule: its generation prompt opens {opened[0].strip()}, "
                f"which it leaves out of a finished chat, so an answer without {closing} would be learned as a thought; give "
                f"answers as the model samples them, or begin those without thoughts with {closing}"
            )
        return whole[len(bare) :]

    def _answered(self, prompt: tuple[Message, ...], text: str) -> str:
        return self.render((*prompt, Message("assistant", text)), add_generation_prompt=False)

    def _preface(self, prompt: tuple[Message, ...], text: str, suffix: str) -> str:
        """What the template writes between the prompt and a plain answer, unless the text brings it along."""
        stripped = text.strip()
        if suffix.startswith((text, stripped)):
            return ""
        before, probed = self.render(prompt), self._answered(prompt, _PROBE)
        if not probed.startswith(before):
            return ""
        preface = probed[len(before) :].partition(_PROBE)[0]
        return preface if suffix.startswith((preface + text, preface + stripped)) else ""

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """The text of completion tokens, special tokens left out unless ``special``; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=not special))

    def _closing(self, suffix: str) -> int:
        """The EOS token that this template writes last after an answer, else the tokenizer's own."""
        named = {token: self._tokenizer.id_to_token(token) for token in self._eos}
        found = {token: suffix.rfind(name) for token, name in named.items() if name}
        best = max(found, key=lambda token: found[token], default=self._eos[0])
        return best if found.get(best, -1) >= 0 else self._eos[0]

    def _own_tool_source(self) -> tuple[str, ...]:
        return (self._tool_source,) if self._tool_source is not None and self._tool_source != self._source else ()

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        template = self._tool_template if tools else self._template
        if tools and template is None:
            raise InvalidRequestError("this model's chat template does not take tools; leave them out", param="tools")
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template, so it cannot read a conversation; send a plain string prompt",
                param="messages",
            )
        if not messages:
            raise InvalidRequestError("the conversation is empty; send at least one message", param="messages")
        if self.reads_parts:
            messages = [{**turn, "content": _as_parts(turn["content"])} for turn in messages]
        try:
            return template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools or None,
                documents=None,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            opening = messages[0]["role"]
            hint = f"; put the {opening} text into the first user turn" if opening in ("system", "developer") else ""
            said = f"the chat template refuses this conversation: {error}{hint}"
            raise InvalidRequestError(said, param="messages") from error

    @cached_property
    def reads_parts(self) -> bool:
        """Whether the template shows a text only as a list of parts (llava-next, idefics3, smolvlm)."""
        return not self._shows(_PROBE) and self._shows(_as_parts(_PROBE))

    def _shows(self, content: Any) -> bool:
        if self._template is None:
            return False
        turns = [{"role": "user", "content": content}]
        try:
            return _PROBE in self._template.render(messages=turns, add_generation_prompt=True, **self.special_tokens)
        except (jinja2.TemplateError, TypeError):
            return False

    def _marked(self, value: Any) -> Any:
        """``value`` with every string in it marked: tools and arguments are typed by someone too."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, list):
            return [self._marked(item) for item in value]
        if isinstance(value, dict):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        return value

    def _mark(self, content: str) -> str:
        content = content.replace(_OPEN, "").replace(_CLOSE, "")
        return self._control.sub(lambda match: f"{_OPEN}{match[0]}{_CLOSE}", content) if self._control else content

    def _encode_marked(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        # A lone mark (the template cut the text inside it) splits too, so that its sides never join into a control token.
        for i, piece in enumerate(re.split(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]", text)):
            if piece:
                ids += (self._plain if i % 2 else self._tokenizer).encode(piece, add_special_tokens=False).ids
        return tuple(ids)


def _turns(prompt: Sequence[Message]) -> list[dict[str, Any]]:
    """The turns as templates read them: the arguments of a call as an object, where they are one."""
    turns = messages_as_dicts(prompt)
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = _object_or_text(call["function"]["arguments"])
    return turns


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _object_or_text(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except json.JSONDecodeError:
        return arguments
    return value if isinstance(value, dict) else arguments


def is_lfs_pointer(path: Path) -> bool:
    """True for the text file that Git LFS leaves where the real file was not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


class _Generation(Extension):
    """Templates may mark answers with ``{% generation %}``; the marks do not change the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance-level set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face templates are written for (transformers, chat_template_utils)."""
    extensions = [_Generation, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compiled(source: str, origin: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"{origin}: the chat template is not valid: line {error.lineno}: {error.message}") from error


def _reads_tools(source: str) -> bool:
    try:
        return "tools" in meta.find_undeclared_variables(_environment().parse(source))
    except jinja2.TemplateSyntaxError:
        return False  # `_compiled` says what is wrong with it


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which models have not been trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tokenizer(text: str, origin: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception, and nothing narrower
        raise ModelError(f"{origin}: tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _template_sources(model_dir: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The template, and the one for conversations with tools where the model names one (``tool_use``).

    chat_template.jinja, else ``chat_template`` of tokenizer_config.json or chat_template.json (a string or a named list).
    """
    source: Any = _read(model_dir / "chat_template.jinja")
    if source is None:
        source = config.get("chat_template") or _read_json(model_dir / "chat_template.json").get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        if "default" not in named:
            raise ModelError(f"{model_dir}: the chat template list has no template named 'default' (it has {sorted(named)})")
        return named["default"] or None, named.get("tool_use")
    return source or None, None


def _special_tokens(model_dir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and the other ``*_token`` entries as strings."""
    found: dict[str, str] = {}
    for source in (_read_json(model_dir / "special_tokens_map.json"), config):
        for key, value in source.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return found


def _read(path: Path) -> str | None:
    if not path.is_file():
        return None
    if is_lfs_pointer(path):
        raise ModelError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in that repository")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: is not UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    text = _read(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must be a JSON object")
    return value
