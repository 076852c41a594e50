"""Raters over HTTP: who they are, what is odd about them, quarantine with a preview."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from pairloop.client.shapes import (
    CheckedRater,
    DuelCount,
    FlipRateResource,
    Page,
    RaterChecks,
    RaterDecision,
    RaterResource,
    ShareResource,
)
from pairloop.errors import NotFoundError
from pairloop.loop import raters as desk
from pairloop.store import quarantines, raters
from pairloop.store.quarantines import Action
from pairloop.web.audit import Actor
from pairloop.web.context import Context, Here
from pairloop.web.paging import Limit, page
from pairloop.web.resources import quarantine_resource, rater_resource
from pairloop.web.wire import NO_NUL, Body, Text512

router = APIRouter(tags=["raters"])

RaterAfter = Annotated[str | None, Query(max_length=512, description="The rater behind whom the page begins.")]


class DecisionRequest(Body):
    """Why a rater's votes are set aside, or counted again; with ``dryrun`` it only says what that would change."""

    reason: Text512 = Field(min_length=1, examples=["votes for the longer answer whatever it says"])
    dryrun: bool = False


class NamedDecisionRequest(DecisionRequest):
    """The same, of a rater whose id no path can hold."""

    rater_id: str = Field(min_length=1, max_length=1_024, pattern=NO_NUL)


@router.get("/v1/raters", summary="Whoever gave feedback, by id")
def list_raters(context: Here, limit: Limit = 20, after: RaterAfter = None) -> Page[RaterResource]:
    with context.store.reading() as c:
        found = raters.list_(c, context.policy_name, after=after, limit=limit + 1)
        held = quarantines.current(c, context.policy_name)
    share = context.config.serve.gate_share
    return page([rater_resource(rater, share, held.get(rater.rater_id)) for rater in found], limit=limit)


@router.get("/v1/raters/{rater_id:path}", summary="One rater")
def get_rater(rater_id: str, context: Here) -> RaterResource:
    with context.store.reading() as c:
        stored = desk.known_id(c, context.store, context.policy_name, rater_id)
        rater = raters.get(c, context.policy_name, stored)
        held = quarantines.current(c, context.policy_name)
    if rater is None:
        raise NotFoundError(f"no rater {rater_id!r}", param="rater_id")
    return rater_resource(rater, context.config.serve.gate_share, held.get(stored))


@router.get("/v1/rater_checks", summary="What is odd about the raters of the newest picks, and how often picks are flipped")
def check_raters(context: Here) -> RaterChecks:
    """Each rater's side, length and duel shares beside what is expected; a flag accuses nobody, and sets nothing aside."""
    found = desk.look(context.store, context.config)
    flips = found.flip_rate
    return RaterChecks(
        data=[
            CheckedRater(
                id=one.rater_id,
                picks=one.picks,
                instant=one.instant,
                shares={name: ShareResource(**asdict(share)) for name, share in one.shares.items()},
                flags=list(one.flags),
                quarantine=quarantine_resource(found.quarantined.get(one.rater_id)),
            )
            for one in found.checked
        ],
        flip_rate=None
        if flips is None
        else FlipRateResource(
            pairs=flips.pairs,
            disagreements=flips.disagreements,
            rate=flips.rate.mean,
            ci95=(flips.rate.lo, flips.rate.hi),
            label_smoothing=flips.label_smoothing,
        ),
    )


@router.post("/v1/raters/{rater_id:path}/quarantine", summary="Set a rater's votes aside, with a reason; nothing is deleted")
def quarantine(rater_id: str, body: DecisionRequest, context: Here, actor: Actor) -> RaterDecision:
    return _decide(context, rater_id, Action.QUARANTINE, body, actor)


@router.post(
    "/v1/raters/quarantine", summary="Set aside the votes of a rater who is named in the body: any id, also one of dots"
)
def quarantine_named(body: NamedDecisionRequest, context: Here, actor: Actor) -> RaterDecision:
    """Clients take the segments `.` and `..` out of a path; the pages send whom they mean here."""
    return _decide(context, body.rater_id, Action.QUARANTINE, body, actor)


@router.post(
    "/v1/raters/release", summary="Count the votes of a rater again who is named in the body: any id, also one of dots"
)
def release_named(body: NamedDecisionRequest, context: Here, actor: Actor) -> RaterDecision:
    return _decide(context, body.rater_id, Action.RELEASE, body, actor)


@router.post("/v1/raters/{rater_id:path}/release", summary="Count a quarantined rater's votes again, with a reason")
def release(rater_id: str, body: DecisionRequest, context: Here, actor: Actor) -> RaterDecision:
    return _decide(context, rater_id, Action.RELEASE, body, actor)


def _decide(context: Context, rater_id: str, action: Action, body: DecisionRequest, actor: str) -> RaterDecision:
    store, config = context.store, context.config
    effect = (
        desk.preview(store, config, rater_id, action)
        if body.dryrun
        else desk.decide(store, config, rater_id, action, body.reason, actor=actor)
    )
    if not body.dryrun:
        context.notify()
    before, after = (None if one is None else DuelCount(**asdict(one)) for one in (effect.duel_before, effect.duel_after))
    return RaterDecision(
        rater_id=effect.rater_id,
        action=action.value,
        picks=effect.picks,
        pairs=effect.pairs,
        duel_before=before,
        duel_after=after,
        dryrun=body.dryrun,
    )
