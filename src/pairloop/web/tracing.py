"""What a chat's span says of request and answer: figures and names, by OpenTelemetry's conventions for generative AI."""

from __future__ import annotations

from fastapi import Request

from pairloop.config import Config
from pairloop.loop.serve import ChatRequest
from pairloop.telemetry import traces
from pairloop.telemetry.traces import Span
from pairloop.types import Group
from pairloop.web.replies import may_name_version

TRACE = "pairloop.trace"
"""Where the scope of a request holds the id of its trace."""


def chat_span(request: Request, asked: ChatRequest, config: Config, *, is_streamed: bool) -> Span:
    """Begin the span of a chat request; the log then names its trace."""
    sampling = asked.params
    about: dict[str, traces.Value | None] = {
        "gen_ai.provider.name": "pairloop",
        "gen_ai.request.max_tokens": asked.max_tokens or config.serve.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": asked.n,
        "gen_ai.request.stream": is_streamed,
        "server.address": request.url.hostname,
        "server.port": request.url.port,
    }
    span = traces.chat(asked.model, about, request.headers)
    if span.trace_id is not None:
        request.scope[TRACE] = span.trace_id
    return span


def tell_answer(span: Span, group: Group, model: str) -> None:
    """End the span with what was answered by ``model``; in a duel neither reply nor span names it."""
    span.set(
        {
            "gen_ai.response.id": group.group_id,
            "gen_ai.response.model": model if may_name_version(group) else None,
            "gen_ai.response.finish_reasons": [str(one.finish_reason) for one in group.completions],
            "gen_ai.usage.input_tokens": len(group.prompt_token_ids),
            "gen_ai.usage.output_tokens": sum(len(one.token_ids) for one in group.completions),
            "gen_ai.conversation.id": group.conversation_id,
        }
    )
    span.end()
