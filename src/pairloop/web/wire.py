"""The chat request of the OpenAI wire: what is accepted, and what is refused with its field's name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pairloop.loop.serve import ChatRequest
from pairloop.types import OUR_NAMES, Message, SamplingParams, ToolCall, with_tools

MAX_N = 128
LEAST_TOP_P = 1e-6
"""What top_p = 0 means: the likeliest token alone."""
MAX_TOOLS = 128
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
PAIR_KEY = "pair"
PAIR_ALLOWED = "allow"

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prompt_cache_key": (),
    "service_tier": ("auto", "default"),
}
"""Fields of the wire that this server does not have, with the values that ask for nothing. Any other value is refused."""

NULLABLE = frozenset(
    [
        "audio",
        "function_call",
        "functions",
        "moderation",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    ]
)
"""Further fields of OpenAI's that clients send as null."""

HINTS = frozenset({"prompt_cache_key"})
"""Fields that change no answer by definition."""


class Body(BaseModel):
    """A request body: no coercion, no unknown field, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _text_of(content: Any) -> Any:
    """A list of text parts as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) and len(part) == 2):
            raise PydanticCustomError("unsupported_content", 'content parts must be {"type": "text", "text": "..."}')
        texts.append(part["text"])
    if not texts:
        raise PydanticCustomError("empty_content", "content has no parts")
    return "\n".join(texts)


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


NO_NUL = r"^[^\x00]*$"
"""No NUL, which not every database keeps; and, as every pattern, no lone surrogate, which is no text."""
PlainText = Annotated[str, StringConstraints(pattern=NO_NUL)]


class CalledFunction(Body):
    name: PlainText = Field(min_length=1, max_length=64)
    arguments: PlainText


class MessageToolCall(Body):
    """A call that an assistant turn made, as the reply told it."""

    id: PlainText = Field(min_length=1, max_length=128)
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Body):
    """One turn. The fields that only ever hold null here are those that clients echo from a reply.

    An assistant turn may make `tool_calls` and then needs no content; a turn of role `tool` answers one of them.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[PlainText | None, BeforeValidator(_text_of, json_schema_input_type=str | list[TextPart] | None)] = None
    tool_calls: Annotated[list[MessageToolCall], Field(min_length=1)] | None = None
    tool_call_id: PlainText | None = None
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_what_its_role_may(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise field_error("content", "content must be a text")
        if self.tool_calls and self.role != "assistant":
            raise field_error("tool_calls", "only an assistant turn calls tools")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise field_error("tool_call_id", "a turn of role tool, and no other, names the call that it answers")
        return self

    def as_message(self) -> Message:
        """The turn in the loop's words; what a model said to itself (`reasoning_content`) is no part of the conversation."""
        role = "system" if self.role == "developer" else self.role
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ())
        return Message(role, self.content or "", calls, self.tool_call_id)


class OfferedFunction(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None
    """True asks for arguments that follow the schema for certain, which no engine here can promise."""


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: OfferedFunction

    @field_validator("function")
    @classmethod
    def _is_text(cls, value: OfferedFunction) -> OfferedFunction:
        return _utf8(value)


class JsonSchema(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    definition: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        return _utf8(self)


class ResponseFormat(Body):
    """`json_object`, or a `json_schema`, where the engine can hold the model to it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise field_error("json_schema", "json_schema goes with type json_schema, and only with it")
        return self


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


Text512 = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]
Key64 = Annotated[str, StringConstraints(max_length=64, pattern=NO_NUL)]
METADATA_PAIRS = 16


def _not_ours(name: str) -> str:
    if name.startswith(OUR_NAMES):
        raise PydanticCustomError(
            "reserved_name", f"names that begin with '{OUR_NAMES}' are the server's own; take another one"
        )
    return name


Metadata = Annotated[
    dict[Annotated[Key64, AfterValidator(_not_ours)], Text512],
    Field(max_length=METADATA_PAIRS, description=f"Names that begin with `{OUR_NAMES}` are the server's own, and are refused."),
]
"""Metadata of a request, tags of feedback."""
StopText = Annotated[str, StringConstraints(min_length=1)]


class ChatBody(Body):
    """The body of POST /v1/chat/completions."""

    model: PlainText
    messages: list[ChatMessage] = Field(min_length=1)
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT64)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT64)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    seed: int | None = Field(default=None, ge=-MAX_INT64, le=MAX_INT64)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    user: Text512 | None = None
    safety_identifier: Text512 | None = None
    metadata: Metadata | None = None
    store: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields
        return {key: value for key, value in data.items() if key in known or not _asks_for_nothing(key, value)}

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise field_error("max_tokens", "max_tokens and max_completion_tokens differ; send one of them")
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "stream_options goes with stream: true")
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs goes with logprobs: true")
        return self

    @model_validator(mode="after")
    def _answers_have_their_calls(self) -> Self:
        made: set[str] = set()
        for place, message in enumerate(self.messages):
            if message.role == "tool" and message.tool_call_id not in made:
                raise field_error(f"messages[{place}].tool_call_id", "no assistant turn before it made this call")
            made |= {call.id for call in message.tool_calls or ()}
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools as the template gets them; none where ``tool_choice`` is none."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]

    def as_request(self, *, pair_allowed: bool, caller: str, user: str | None) -> ChatRequest:
        """The request in the loop's own words; ``user`` is who asks, as far as the server lets the body say so."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        metadata = self.metadata or {}
        form = self.response_format
        return ChatRequest(
            model=self.model,
            messages=with_tools(self.offered_tools, [message.as_message() for message in self.messages]),
            n=self.n or 1,
            params=SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else max(self.top_p, LEAST_TOP_P),
                stop=stop,
                seed=self.seed,
            ),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            user=user,
            metadata=metadata,
            caller=caller,
            pair_allowed=pair_allowed or metadata.get(PAIR_KEY) == PAIR_ALLOWED,
            is_listed=self.store is not False,
            one_call=self.parallel_tool_calls is False,
            with_logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            response_format=form.model_dump(by_alias=True, exclude_unset=True) if form and form.type != "text" else None,
        )


def field_error(param: str, message: str) -> PydanticCustomError:
    """A refusal that comes from two fields together and names one of them (errors.from_validation reads ``param``)."""
    return PydanticCustomError("fields_disagree", "{reason}", {"param": param, "reason": message})


def _asks_for_nothing(key: str, value: Any) -> bool:
    if value is None:
        return key in NULLABLE or key in NEUTRAL
    return key in NEUTRAL and (key in HINTS or value in NEUTRAL[key])


_Part = TypeVar("_Part", bound=Body)


def _utf8(part: _Part) -> _Part:
    """The part, where everything in it is text that can be written down."""
    try:
        json.dumps(part.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("string_unicode", "it holds a lone surrogate, which is no Unicode text") from error
    return part
