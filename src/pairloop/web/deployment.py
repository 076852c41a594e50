"""Moving versions by hand: promote, at once or as a canary, stop the canary, roll back; and what the live guards say."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter
from pydantic import Field

from pairloop.client.shapes import GuardsResource, Moved
from pairloop.loop import deploy
from pairloop.store.canaries import Canary
from pairloop.store.versions import Promotion
from pairloop.web.api import check_policy, version_of
from pairloop.web.audit import BY_HAND, Actor
from pairloop.web.context import Here
from pairloop.web.resources import guards_resource
from pairloop.web.wire import MAX_INT32, Body, Text512

router = APIRouter(tags=["loop"])


class MoveRequest(Body):
    """Why an alias is moved by hand."""

    reason: Text512 | None = Field(default=None, examples=["answers in the wrong language"])


class PromoteRequest(MoveRequest):
    """``canary_share``: of the users whom the version answers before it may answer all; 1 leaves nobody to compare."""

    canary_share: float | None = Field(default=None, gt=0, lt=1, examples=[0.1])


class RollbackRequest(MoveRequest):
    """``to`` defaults to the champion before the present one."""

    to: int | None = Field(default=None, ge=0, le=MAX_INT32, examples=[3])


@router.post("/v1/policies/{name}/rollback", summary="Make an earlier champion the champion again")
def rollback(name: str, context: Here, actor: Actor, body: RollbackRequest | None = None) -> Moved:
    check_policy(context, name)
    to, reason = (body.to, body.reason) if body is not None else (None, None)
    moved = deploy.rollback(context.store, name, to=to, reason=reason or BY_HAND, policy=context.policy, actor=actor)
    context.notify()
    return _moved(moved)


@router.post("/v1/versions/{version_id}/promote", summary="Make a version the champion, past the gate")
def promote(version_id: str, context: Here, actor: Actor, body: PromoteRequest | None = None) -> Moved:
    """With `canary_share` the version answers that share of the users first, and is promoted if no live guard breaks."""
    body = body or PromoteRequest()
    with context.store.reading() as c:
        number = version_of(context, c, version_id).number
    store, policy, reason = context.store, context.policy, body.reason or BY_HAND
    if body.canary_share is not None:
        canary = deploy.start_canary(
            store, policy, context.config, number=number, share=body.canary_share, reason=reason, actor=actor
        )
        return _canary_moved("canary_start", canary, reason)
    moved = deploy.promote_by_hand(store, policy, context.policy_name, number=number, reason=reason, actor=actor)
    context.notify()
    return _moved(moved)


@router.get("/v1/policies/{name}/guards", summary="What the live guards say of the version under watch")
def get_guards(name: str, context: Here) -> GuardsResource:
    """Of the canary, else the challenger in its duel, else the champion until `deploy.watch_hours` after its promotion."""
    check_policy(context, name)
    with context.store.reading() as c:
        found = deploy.standing(c, context.config, datetime.now(UTC))
    return guards_resource(name, found)


@router.post("/v1/policies/{name}/canary/stop", summary="Withdraw the canary: the champion answers everybody again")
def stop_canary(name: str, context: Here, actor: Actor, body: MoveRequest | None = None) -> Moved:
    check_policy(context, name)
    reason = (body.reason if body is not None else None) or BY_HAND
    ended = deploy.stop_canary(context.store, name, reason=reason, actor=actor)
    context.notify()
    return _canary_moved("canary_stop", ended, reason)


def _moved(moved: Promotion) -> Moved:
    return Moved(
        action=moved.action,
        champion=f"{moved.policy}@{moved.number}",
        previous=None if moved.previous is None else f"{moved.policy}@{moved.previous}",
        reason=moved.reason,
    )


def _canary_moved(action: str, canary: Canary, reason: str) -> Moved:
    """What became of a canary: the version beside the champion, and its share of the users."""
    name = canary.policy
    return Moved(
        action=action,
        champion=f"{name}@{canary.champion}",
        previous=None,
        reason=reason,
        canary=f"{name}@{canary.version}",
        canary_share=canary.share,
    )
