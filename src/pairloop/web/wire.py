"""The chat request of the OpenAI wire: what is accepted, and what is refused with its field's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from pairloop.loop.serve import ChatRequest
from pairloop.types import Message, SamplingParams

MAX_N = 128
LEAST_TOP_P = 1e-6
"""What top_p = 0 means: the likeliest token alone."""
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
PAIR_KEY = "pair"
PAIR_ALLOWED = "allow"

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prompt_cache_key": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields of the wire that this server does not have, with the values that ask for nothing. Any other value is refused."""

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


class ChatMessage(Body):
    """One turn. The fields that only ever hold null here are those that clients echo from a reply."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of, json_schema_input_type=str | list[TextPart])]
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def as_message(self) -> Message:
        return Message("system" if self.role == "developer" else self.role, self.content)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


Text512 = Annotated[str, StringConstraints(max_length=512)]
Key64 = Annotated[str, StringConstraints(max_length=64)]
Metadata = Annotated[dict[Key64, Text512], Field(max_length=16)]
StopText = Annotated[str, StringConstraints(min_length=1)]


class ChatBody(Body):
    """The body of POST /v1/chat/completions."""

    model: str
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
            raise _field_error("max_tokens", "max_tokens and max_completion_tokens differ; send one of them")
        if self.stream_options is not None and not self.stream:
            raise _field_error("stream_options", "stream_options goes with stream: true")
        if self.top_logprobs is not None and not self.logprobs:
            raise _field_error("top_logprobs", "top_logprobs goes with logprobs: true")
        if self.top_logprobs:
            raise _field_error("top_logprobs", "this engine tells the log-prob of the sampled token only; send 0")
        return self

    def as_request(self, *, pair_allowed: bool) -> ChatRequest:
        """The request in the loop's own words."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        metadata = self.metadata or {}
        return ChatRequest(
            model=self.model,
            messages=tuple(message.as_message() for message in self.messages),
            n=self.n or 1,
            params=SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else max(self.top_p, LEAST_TOP_P),
                stop=stop,
                seed=self.seed,
            ),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            user=self.user or self.safety_identifier or None,
            metadata=metadata,
            pair_allowed=pair_allowed or metadata.get(PAIR_KEY) == PAIR_ALLOWED,
        )


def _field_error(param: str, message: str) -> PydanticCustomError:
    """A refusal that comes from two fields together and names one of them (errors.from_validation reads ``param``)."""
    return PydanticCustomError("fields_disagree", "{reason}", {"param": param, "reason": message})


def _asks_for_nothing(key: str, value: Any) -> bool:
    if key not in NEUTRAL:
        return False
    return value is None or key in HINTS or value in NEUTRAL[key]
