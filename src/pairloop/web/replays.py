"""A recorded request asked once more, of another version: for whoever wants to see what that one would have said."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.store import groups
from pairloop.types import Group
from pairloop.web.api import version_of
from pairloop.web.context import Context, Here
from pairloop.web.wire import Body, PlainText

router = APIRouter(tags=["loop"])


class ReplayRequest(Body):
    """Which request, and who is to answer it: a version by its name, such as support-bot@2."""

    inference_id: PlainText = Field(max_length=255)
    model: PlainText = Field(max_length=255)


class ReplayResource(BaseModel):
    """What the version said; `logp_mean` is per token, at temperature 1."""

    object: Literal["replay"] = "replay"
    inference_id: str
    model: str
    text: str
    finish_reason: str
    tokens: int
    logp_mean: float | None


@router.post("/v1/replays", summary="Ask a recorded request again, of another version; nothing is recorded")
async def replay(body: ReplayRequest, context: Here) -> ReplayResource:
    """The same prompt and sampling, one answer. It is no request of anybody's: it trains nothing and no guard counts it."""
    group, number = await asyncio.to_thread(_asked, context, body)
    said = await context.service.replay(group, number)
    return ReplayResource(
        inference_id=group.group_id,
        model=f"{context.policy_name}@{number}",
        text=said.text,
        finish_reason=said.finish_reason.value,
        tokens=len(said.token_ids),
        logp_mean=sum(said.logps) / len(said.logps) if said.logps else None,
    )


def _asked(context: Context, body: ReplayRequest) -> tuple[Group, int]:
    with context.store.reading() as c:
        group = groups.get(c, body.inference_id)
        if group is None or group.policy != context.policy_name:
            raise NotFoundError(f"no inference {body.inference_id!r}", param="inference_id")
        number = version_of(context, c, body.model, param="model").number
    if not group.prompt:
        raise InvalidRequestError("what was asked was erased: there is nothing to ask again", param="inference_id")
    return group, number
