"""The inference routes of the OpenAI wire: chat completions, whole or streamed, and the models that answer them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from pairloop.errors import NotFoundError, PairloopError, log_failure
from pairloop.loop.serve import AnswerStream, version_called
from pairloop.store import versions
from pairloop.telemetry.traces import Span
from pairloop.types import Group, Version
from pairloop.web import scopes
from pairloop.web.audit import actor_of
from pairloop.web.callers import caller_of, name_of
from pairloop.web.chunks import Chunks
from pairloop.web.context import Context, Here, context_of
from pairloop.web.errors import ErrorResponse, error_response, from_error
from pairloop.web.replies import JSON, Head, completion_body, head_of, may_name_version
from pairloop.web.tracing import chat_span, tell_answer
from pairloop.web.wire import PAIR_ALLOWED, ChatBody

logger = logging.getLogger(__name__)
router = APIRouter(tags=["inference"])

PAIR_HEADER = "x-pairloop-pair"
VERSION_HEADER = "x-pairloop-model-version"
SSE = "text/event-stream"


@router.post("/v1/chat/completions", summary="Answer a conversation, once or with a comparison of two", response_model=None)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Two answers come with `n: 2`, or where the client takes them (`metadata.pair: "allow"`, or `x-pairloop-pair: allow`) and
    the server's exposure rate says so. Their order is the coin: index 0 is shown left unless the pick says otherwise.

    A conversation goes on from the answer that its last assistant turn repeats, or that `metadata.parent` names.
    `metadata.conversation_id` names the conversation, for outcomes that are known later.

    `tools` are offered where the model's template has them; calls are read out of the text, which is kept as it was sampled.
    `tool_choice` is none or auto; `parallel_tool_calls: false` ends an answer with its first call. `response_format` and
    `top_logprobs` work where the engine can; what it cannot do is a 400 that names the field.

    With the scope `rate` alone `model` is the policy's name: the answer of a version that is named would unblind a duel.
    """
    context, caller = context_of(request), caller_of(request.scope)
    if body.model != context.policy_name and caller is not None and not caller.allows(scopes.NAME_VERSIONS):
        text = (
            f"This key may ask for {context.policy_name!r} alone, and for no version of it: that takes the scope 'inference'."
        )
        return error_response(403, text, param="model", code="insufficient_scope")
    pair_allowed = request.headers.get(PAIR_HEADER) == PAIR_ALLOWED
    user = name_of(caller, body.user or body.safety_identifier or None, "user")
    asked = body.as_request(pair_allowed=pair_allowed, caller=actor_of(request), user=user)
    span = chat_span(request, asked, context.config, is_streamed=bool(body.stream))
    try:
        if body.stream:
            return await _streamed(context, body, await context.service.stream(asked), span)
        answer = await context.service.answer(asked, with_tokens=bool(body.logprobs))
        context.metrics.answered(answer.group)
        head, headers = await head_and_headers(context, answer.group, answer.group.completions[0].version)
        tell_answer(span, answer.group, head.model)
    except BaseException as error:
        span.fail(type(error).__name__)
        span.end()
        raise
    whole = completion_body(head, answer, context.policy.tokens, with_logprobs=bool(body.logprobs))
    return json_response(whole, headers)


async def _streamed(context: Context, body: ChatBody, stream: AnswerStream, span: Span) -> Response:
    head, headers = await head_and_headers(context, stream.group, stream.plan.versions[0])
    chunks = Chunks(
        head,
        stream.group,
        len(stream.plan.versions),
        context.policy.tokens,
        with_logprobs=bool(body.logprobs),
        with_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_events(context, stream, chunks, span, head.model), media_type=SSE, headers=headers)


async def _events(context: Context, stream: AnswerStream, chunks: Chunks, span: Span, model: str) -> AsyncIterator[str]:
    """The chunks of a reply; a client that goes away ends this generator early, and the group is abandoned."""
    try:
        yield chunks.opening()
        async for batch in stream.batches():
            text = chunks.tokens(batch)
            if text:
                yield text
        answer = await stream.finish()
        context.metrics.answered(answer.group)
        tell_answer(span, answer.group, model)
        yield chunks.closing(answer.group)
    except PairloopError as error:
        span.fail(type(error).__name__)
        # The status line is gone already; the official client raises on a chunk that holds an error.
        yield _error_event(context, from_error(error))
    except Exception as error:  # noqa: BLE001 - the supervisor's line: logged, told, and nothing else is lost by it
        span.fail(type(error).__name__)
        log_failure(logger, error, "a stream of %s failed", stream.group.group_id)
        yield _error_event(context, error_response(500, "Internal error while answering.", code="internal_error"))
    except (asyncio.CancelledError, GeneratorExit):
        span.fail("abandoned")
        raise
    finally:
        span.end()
        stream.abandon()


def _error_event(context: Context, reply: ErrorResponse) -> str:
    context.metrics.errors.labels(reply.code).inc()
    return f"data: {bytes(reply.body).decode()}\n\n"


async def head_and_headers(context: Context, group: Group, number: int | None) -> tuple[Head, dict[str, str]]:
    """The reply's head and headers; a duel must not unblind itself, so there they name no version."""
    version = None
    if number is not None and may_name_version(group):
        version = await context.service.version(number)
    head = head_of(group, version, context.policy.tokens, context.config)
    return head, {VERSION_HEADER: version.name} if version else {}


@router.get(
    "/v1/models", summary="Policies, then their versions, then fine-tuned models; each is a valid model of chat and of jobs"
)
async def models(context: Here) -> dict[str, Any]:
    known = await asyncio.to_thread(_versions, context)
    data = [_model(context.policy_name, known[0].created_at.timestamp() if known else 0)]
    data += [_model(version.name, version.created_at.timestamp()) for version in known]
    data += [_model(version.model_name, version.created_at.timestamp()) for version in known if version.model_name]
    return {"object": "list", "data": data}


@router.get("/v1/models/{model}", summary="One model")
async def model(model: str, context: Here) -> dict[str, Any]:
    known = await asyncio.to_thread(_versions, context)
    if model == context.policy_name:
        return _model(model, known[0].created_at.timestamp() if known else 0)
    number = await asyncio.to_thread(_called, context, model)
    for version in known:
        if version.name == model or (version.number == number and model.startswith(f"{version.policy}@")):
            return _model(version.name, version.created_at.timestamp())
    made = await asyncio.to_thread(_fine_tuned, context, model)
    if made is not None:
        return _model(model, made.created_at.timestamp())
    raise NotFoundError(f"the model {model!r} does not exist", param="model")


def version_name(policy: str, number: int | None) -> str | None:
    return None if number is None else f"{policy}@{number}"


def _versions(context: Context) -> list[Version]:
    with context.store.reading() as c:
        return versions.list_(c, context.policy_name)


def _fine_tuned(context: Context, model: str) -> Version | None:
    """The model or checkpoint of a fine-tuning job that this server can answer with."""
    with context.store.reading() as c:
        version = versions.by_model_name(c, model)
    return version if version is not None and version.policy == context.policy_name else None


def _called(context: Context, model: str) -> int | None:
    with context.store.reading() as c:
        return version_called(c, context.policy_name, model.partition("@")[2])


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "pairloop"}


def json_response(body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body, ensure_ascii=False, separators=(",", ":")), media_type=JSON, headers=headers)
