"""The inference routes of the OpenAI wire: chat completions, whole or streamed, and the models that answer them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from pairloop.errors import NotFoundError, PairloopError
from pairloop.loop.feedback import is_revealed
from pairloop.loop.serve import Answer, AnswerStream
from pairloop.store import groups, versions
from pairloop.types import BASE_VERSION, Group, Version
from pairloop.web.context import Context, Here, context_of
from pairloop.web.errors import from_error
from pairloop.web.replies import JSON, Chunks, Head, completion_body, head_of, may_name_version
from pairloop.web.wire import PAIR_ALLOWED, ChatBody

router = APIRouter(tags=["inference"])

PAIR_HEADER = "x-pairloop-pair"
VERSION_HEADER = "x-pairloop-model-version"
SSE = "text/event-stream"


@router.post("/v1/chat/completions", summary="Answer a conversation, once or with a comparison of two", response_model=None)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    context = context_of(request)
    asked = body.as_request(pair_allowed=request.headers.get(PAIR_HEADER) == PAIR_ALLOWED)
    if body.stream:
        return await _streamed(context, body, await context.service.stream(asked))
    answer = await context.service.answer(asked, with_tokens=bool(body.logprobs))
    context.metrics.answered(answer.group)
    head, headers = await _head(context, answer.group, answer.group.completions[0].version)
    whole = completion_body(head, answer, context.policy.tokens, with_logprobs=bool(body.logprobs))
    return _json(whole, headers)


async def _streamed(context: Context, body: ChatBody, stream: AnswerStream) -> Response:
    head, headers = await _head(context, stream.group, stream.plan.versions[0])
    chunks = Chunks(
        head,
        len(stream.plan.versions),
        context.policy.tokens,
        stops=stream.group.sampling.stop,
        with_logprobs=bool(body.logprobs),
        with_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_events(context, stream, chunks), media_type=SSE, headers=headers)


async def _events(context: Context, stream: AnswerStream, chunks: Chunks) -> AsyncIterator[str]:
    """The chunks of a reply; a client that goes away ends this generator early, and the group is abandoned."""
    try:
        yield chunks.opening()
        async for batch in stream.batches():
            text = chunks.tokens(batch)
            if text:
                yield text
        answer = await stream.finish()
        context.metrics.answered(answer.group)
        yield chunks.closing(answer.group)
    except PairloopError as error:
        # The status line is gone already; the official client raises on a chunk that holds an error.
        yield f"data: {bytes(from_error(error).body).decode()}\n\n"
    finally:
        stream.abandon()


async def _head(context: Context, group: Group, number: int | None) -> tuple[Head, dict[str, str]]:
    """The reply's head and headers; a duel must not unblind itself, so there they name no version."""
    version = None
    if number is not None and may_name_version(group):
        version = await context.service.version(number)
    head = head_of(group, version, context.policy.tokens, context.config)
    return head, {VERSION_HEADER: version.name} if version else {}


@router.get("/v1/chat/completions/{completion_id}", summary="A stored completion", response_model=None)
async def stored_completion(completion_id: str, context: Here) -> Response:
    group, revealed = await asyncio.to_thread(_stored, context, completion_id)
    named = group.completions[0].version if revealed and may_name_version(group) else None
    version = await context.service.version(named) if named is not None else None
    head = head_of(group, version, context.policy.tokens, context.config)
    body = completion_body(head, Answer(group, ()), context.policy.tokens, with_logprobs=False)
    body["metadata"] = dict(group.metadata)
    if revealed:
        body["versions"] = [version_name(group.policy, completion.version) for completion in group.completions]
    return _json(body)


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
    wanted = re.sub("@base$", f"@{BASE_VERSION}", model)
    for version in known:
        if version.name == wanted:
            return _model(version.name, version.created_at.timestamp())
    made = await asyncio.to_thread(_fine_tuned, context, model)
    if made is not None:
        return _model(model, made.created_at.timestamp())
    raise NotFoundError(f"the model {model!r} does not exist", param="model")


def version_name(policy: str, number: int | None) -> str | None:
    return None if number is None else f"{policy}@{number}"


def _stored(context: Context, completion_id: str) -> tuple[Group, bool]:
    with context.store.reading() as c:
        group = groups.get(c, completion_id)
        if group is None or group.is_abandoned:
            raise NotFoundError(f"no stored completion {completion_id!r}", param="completion_id")
        return group, is_revealed(c, group)


def _versions(context: Context) -> list[Version]:
    with context.store.reading() as c:
        return versions.list_(c, context.policy_name)


def _fine_tuned(context: Context, model: str) -> Version | None:
    """The model or checkpoint of a fine-tuning job that this server can answer with."""
    with context.store.reading() as c:
        version = versions.by_model_name(c, model)
    return version if version is not None and version.policy == context.policy_name else None


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "pairloop"}


def _json(body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body, ensure_ascii=False, separators=(",", ":")), media_type=JSON, headers=headers)
