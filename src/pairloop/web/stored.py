"""Stored completions of the OpenAI wire: listed, shown, given other metadata, deleted."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import Connection

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.loop import privacy
from pairloop.loop.feedback import is_revealed
from pairloop.loop.serve import CONVERSATION_KEY, Answer, version_called
from pairloop.store import stored, versions
from pairloop.store.stored import StoredCompletion
from pairloop.store.waiting import awaitable
from pairloop.types import Group, Message, offered_tools, spoken
from pairloop.web.chat import head_and_headers, json_response, version_name
from pairloop.web.context import Context, Here
from pairloop.web.paging import After
from pairloop.web.replies import completion_body
from pairloop.web.wire import METADATA_PAIRS, Body, Metadata

router = APIRouter(tags=["inference"])

T = TypeVar("T")
MAX_VALUE = 512

Limit = Annotated[int, Query(ge=1, le=100)]
CompletionId = Annotated[str, Path(max_length=128)]
Order = Literal["asc", "desc"]
_METADATA_QUERY = re.compile(r"metadata\[([^\x00]{1,64})\]")
_METADATA_PARAMETER = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "Pairs that must all be there: metadata[key]=value.",
    "schema": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 512}, "maxProperties": 16},
}
_LIST_QUERY = frozenset({"model", "after", "limit", "order"})


class MetadataBody(Body):
    """The metadata that replaces what a stored completion has; null or {} leaves none."""

    metadata: Metadata | None


@router.get(
    "/v1/chat/completions",
    summary="Stored completions, the oldest first",
    response_model=None,
    openapi_extra={"parameters": [_METADATA_PARAMETER]},
)
async def list_completions(
    request: Request,
    context: Here,
    model: Annotated[str | None, Query(max_length=255)] = None,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> Response:
    """All that were answered whole, but for those sent with `store: false` and those deleted.

    Here `store` counts as true unless it is false. `model` is a policy (all its answers) or one version; an answer of a duel is
    under its policy alone, before and after the pick. `metadata[key]=value`, also several times, asks for pairs that must all
    be there. `after` is the id of any completion, also of one that was deleted since.
    """
    wanted = _metadata_asked(request)

    def read(c: Connection) -> list[tuple[StoredCompletion, bool]]:
        found = stored.page(
            c,
            context.policy_name,
            model=_version_asked(c, context.policy_name, model),
            metadata=wanted,
            after=after,
            limit=limit + 1,
            newest_first=order == "desc",
        )
        return [(one, is_revealed(c, one.group)) for one in found]

    found = await _reading(context, read)
    data = [await _body(context, one, revealed=revealed) for one, revealed in found[:limit]]
    return json_response(_page(data, has_more=len(found) > limit))


@router.get("/v1/chat/completions/{completion_id}", summary="A stored completion", response_model=None)
async def stored_completion(completion_id: CompletionId, context: Here) -> Response:
    """Also one that is not listed. `versions` names who gave each answer; of a duel only once someone has picked."""
    one, revealed = await _reading(context, lambda c: _found(c, stored.get(c, completion_id), completion_id))
    return json_response(await _body(context, one, revealed=revealed))


@router.post("/v1/chat/completions/{completion_id}", summary="Replace a stored completion's metadata", response_model=None)
async def update_completion(completion_id: CompletionId, body: MetadataBody, context: Here) -> Response:
    """What the listing filters by. The conversation that the first metadata named stays linked as it was."""
    metadata, redactor = body.metadata or {}, context.store.redactor
    kept = metadata if redactor is None else redactor.values(metadata, ids=(CONVERSATION_KEY,))

    def write(c: Connection) -> tuple[StoredCompletion, bool]:
        return _found(c, stored.replace_metadata(c, completion_id, kept), completion_id)

    one, revealed = await awaitable(context.store.submit(write))
    return json_response(await _body(context, one, revealed=revealed))


@router.delete("/v1/chat/completions/{completion_id}", summary="Delete a stored completion for good", response_model=None)
async def delete_completion(completion_id: CompletionId, context: Here) -> Response:
    """Takes it off the wire and erases prompt, answers, token ids, log-probs and metadata; no later dataset holds it.

    What stays: that it was, who answered, and labels and numbers about it, so that what was trained can be traced. Datasets
    that were compiled before keep their rows; `POST /v1/erasures` cleans those, too.
    """
    if not await asyncio.to_thread(privacy.delete_completion, context.store, context.config, completion_id):
        raise _unknown(completion_id)
    return json_response({"object": "chat.completion.deleted", "id": completion_id, "deleted": True})


@router.get("/v1/chat/completions/{completion_id}/messages", summary="The messages that were answered", response_model=None)
async def completion_messages(
    completion_id: CompletionId, context: Here, after: After = None, limit: Limit = 20, order: Order = "asc"
) -> Response:
    """Those of the request, in their order; the answers are the completion's own."""
    one, _ = await _reading(context, lambda c: _found(c, stored.get(c, completion_id), completion_id))
    prompt = one.group.prompt
    turns = (Message("user", prompt),) if isinstance(prompt, str) else spoken(prompt)
    shown = [_message(completion_id, place, turn) for place, turn in enumerate(turns)]
    if order == "desc":
        shown.reverse()
    ids = [message["id"] for message in shown]
    if after is not None and after not in ids:
        raise NotFoundError(f"{completion_id} has no message {after!r}", param="after")
    rest = shown[ids.index(after) + 1 :] if after is not None else shown
    return json_response(_page(rest[:limit], has_more=len(rest) > limit))


async def _reading(context: Context, read: Callable[[Connection], T]) -> T:
    def run() -> T:
        with context.store.reading() as c:
            return read(c)

    return await asyncio.to_thread(run)


def _found(c: Connection, one: StoredCompletion | None, completion_id: str) -> tuple[StoredCompletion, bool]:
    """The completion, and whether its versions may be told."""
    if one is None:
        raise _unknown(completion_id)
    return one, is_revealed(c, one.group)


def _unknown(completion_id: str) -> NotFoundError:
    return NotFoundError(f"no stored completion {completion_id!r}", param="completion_id")


async def _body(context: Context, one: StoredCompletion, *, revealed: bool) -> dict[str, Any]:
    """The reply as it was given, what it was asked with, and who answered where that may be told."""
    group = replace(one.group, metadata=one.metadata)
    head, _ = await head_and_headers(context, group, group.completions[0].version)
    body = completion_body(head, Answer(group, ()), context.policy.tokens, with_logprobs=False)
    body |= _asked_with(group)
    if revealed:
        body["versions"] = [version_name(group.policy, completion.version) for completion in group.completions]
    return body


def _asked_with(group: Group) -> dict[str, Any]:
    return {
        "metadata": dict(group.metadata),
        "temperature": group.sampling.temperature,
        "top_p": group.sampling.top_p,
        "seed": group.sampling.seed,
        "input_user": group.user,
        "tools": offered_tools(group.prompt) or None,
    }


def _message(completion_id: str, place: int, turn: Message) -> dict[str, Any]:
    shown = turn.as_dict()
    if turn.tool_calls and not turn.content:
        shown["content"] = None
    return {
        "id": f"{completion_id}-{place}",
        **shown,
        "refusal": None,
        "name": None,
        "content_parts": None,
    }


def _page(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's list; its schema wants texts for the ends of an empty page, too."""
    ends = (data[0]["id"], data[-1]["id"]) if data else ("", "")
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}


def _metadata_asked(request: Request) -> Mapping[str, str]:
    """The pairs of ``metadata[key]=value``; InvalidRequestError for any query parameter that is not one of ours."""
    pairs: dict[str, str] = {}
    for name, value in _unknown_parameters(request.query_params.multi_items()):
        match = _METADATA_QUERY.fullmatch(name)
        if match is None:
            raise InvalidRequestError(
                f"unknown query parameter {name!r}; there are model, metadata[key], after, limit and order", param=name
            )
        if len(value) > MAX_VALUE or "\x00" in value:
            raise InvalidRequestError(f"{name} has a value of at most {MAX_VALUE} characters, none of them NUL", param=name)
        if pairs.setdefault(match[1], value) != value:
            raise InvalidRequestError(f"{name} is given twice, with two values; a key has one", param=name)
    if len(pairs) > METADATA_PAIRS:
        raise InvalidRequestError(f"metadata has {len(pairs)} pairs; at most {METADATA_PAIRS} can be there", param="metadata")
    return pairs


def _unknown_parameters(items: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    return ((name, value) for name, value in items if name not in _LIST_QUERY)


def _version_asked(c: Connection, policy: str, model: str | None) -> str | None:
    """The name under which the model's answers are stored; None for all answers of the policy."""
    if model is None or model == policy:
        return None
    named = versions.by_model_name(c, model)
    if named is not None:
        return named.name
    name, _, selector = model.partition("@")
    number = version_called(c, policy, selector)
    return model if number is None else f"{name}@{number}"
