"""The labelling queue over HTTP: what a rater looks at next, held for them, and the gold items that measure them."""

from __future__ import annotations

import random
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from pairloop.client.shapes import (
    AgreedItem,
    GoldResource,
    Page,
    Queue,
    QueueChoice,
    QueueItem,
    Reservation,
    ReservationEnd,
    ReservationItem,
    UnanimousGold,
)
from pairloop.errors import InvalidRequestError
from pairloop.judge import messages_of
from pairloop.loop import raters as desk
from pairloop.store import gold, reservations
from pairloop.store.gold import Gold
from pairloop.types import Group, Label
from pairloop.web.audit import Actor
from pairloop.web.callers import AsCaller, Caller, name_of
from pairloop.web.context import Here
from pairloop.web.paging import Limit, page
from pairloop.web.picks import Rater
from pairloop.web.resources import seconds
from pairloop.web.wire import NO_NUL, Body, Text512

router = APIRouter(tags=["raters"])

RaterId = Annotated[
    str | None, Query(min_length=1, max_length=512, description="Who is about to look; a session may leave it out.")
]
GoldAfter = Annotated[str | None, Query(max_length=255, description="The gold item behind which the page begins.")]
_LABELS = (Label.A, Label.B)
_RNG = random.SystemRandom()


class ReservationRequest(Body):
    """Who labels; who is signed in may leave it out."""

    rater_id: Rater | None = None


class GoldRequest(Body):
    """Which answer of a comparison is known to be the better one, and why."""

    inference_id: str = Field(max_length=255, pattern=NO_NUL)
    chosen_index: int = Field(ge=0, le=1)
    reason: Text512 = Field(min_length=1)


class UnanimousRequest(Body):
    """Make gold of comparisons from which at least ``min_raters`` people picked the same answer, and none another."""

    min_raters: int = Field(default=3, ge=2, le=100)
    limit: int = Field(default=20, ge=1, le=100)
    reason: Text512 = Field(default="all agreed", min_length=1)
    dryrun: bool = False


class TakeBackRequest(Body):
    """Why a comparison is no gold any more."""

    reason: Text512 = Field(min_length=1)


@router.get(
    "/v1/queue", summary="The next comparison for a rater: one that wants picks, now and then one of their own again; not held"
)
def next_in_queue(context: Here, caller: AsCaller, rater_id: RaterId = None, repeats_only: bool = False) -> Queue:
    """Show `choices` in their order, and send the pick with `rater_id`, `shown_order` and `repeat` to `POST /v1/preferences`.

    New ones come from the rater's own pool. With `repeats_only` there are only own ones again, by `feedback.repeat_share`.
    Where several people label at once, `POST /v1/queue/reservations` gives each a comparison of their own.
    """
    item = desk.next_item(context.store, context.config, _rater(caller, rater_id), rng=_RNG, repeats_only=repeats_only)
    if item is None:
        return Queue(item=None)
    return Queue(
        item=QueueItem(
            inference_id=item.group.group_id,
            messages=messages_of(item.group.prompt),
            choices=_choices(item.group, item.shown_order),
            shown_order=list(item.shown_order),
            repeat=item.is_repeat,
        )
    )


@router.post("/v1/queue/reservations", summary="Take the next comparison; it is this rater's for queue.hold")
def reserve(body: ReservationRequest, context: Here, caller: AsCaller) -> Reservation:
    """Show `choices` in their order, and send the pick with `reservation_id` to `POST /v1/preferences`, once more to revise it.

    Who asks again before they answered gets the same. Whether it is new, gold, or one of their own again is not told.
    """
    held = desk.reserve(context.store, context.config, _rater(caller, body.rater_id), rng=_RNG)
    if held is None:
        return Reservation(item=None)
    return Reservation(
        item=ReservationItem(
            id=held.reservation.reservation_id,
            inference_id=held.group.group_id,
            messages=messages_of(held.group.prompt),
            choices=_choices(held.group, held.reservation.shown_order),
            shown_order=list(held.reservation.shown_order),
            expires_at=seconds(held.reservation.expires_at),
        )
    )


@router.delete("/v1/queue/reservations/{reservation_id}", summary="Give a comparison back to the queue, unanswered")
def give_back(reservation_id: str, context: Here, caller: AsCaller) -> ReservationEnd:
    own = name_of(caller, None, "rater_id")
    rater = None if own is None else desk.stored_id(context.store, own)
    deleted = context.store.write(lambda c: reservations.give_back(c, reservation_id, rater_id=rater))
    return ReservationEnd(id=reservation_id, deleted=deleted)


@router.get("/v1/queue/gold", summary="Comparisons whose answer is known, newest first")
def list_gold(context: Here, limit: Limit = 20, after: GoldAfter = None) -> Page[GoldResource]:
    with context.store.reading() as c:
        found = gold.list_(c, context.policy_name, after=after, limit=limit + 1)
    return page([_gold(item) for item in found], limit=limit)


@router.post("/v1/queue/gold", status_code=201, summary="Mark a comparison as gold: its better answer is known")
def mark_gold(body: GoldRequest, context: Here, actor: Actor) -> GoldResource:
    """From then on the queue mixes it in by `queue.gold_share`. What is said of it there is no vote, and never trains."""
    label = _LABELS[body.chosen_index]
    return _gold(desk.gold.mark(context.store, context.config, body.inference_id, label, body.reason, actor=actor))


@router.post("/v1/queue/gold/unanimous", summary="Make gold of comparisons about which all who picked agreed")
def mark_unanimous(body: UnanimousRequest, context: Here, actor: Actor) -> UnanimousGold:
    found = desk.gold.mark_unanimous(
        context.store,
        context.config,
        min_raters=body.min_raters,
        limit=body.limit,
        reason=body.reason,
        actor=actor,
        dryrun=body.dryrun,
    )
    data = [AgreedItem(inference_id=one.group_id, chosen_index=_LABELS.index(one.label), raters=one.raters) for one in found]
    return UnanimousGold(data=data, dryrun=body.dryrun)


@router.post("/v1/queue/gold/{inference_id}/take_back", summary="A comparison is no gold any more, with a reason")
def take_back(inference_id: str, body: TakeBackRequest, context: Here, actor: Actor) -> GoldResource:
    """What was said of it stays, and counts no more."""
    return _gold(desk.gold.take_back(context.store, context.config, inference_id, body.reason, actor=actor))


def _rater(caller: Caller | None, named: str | None) -> str:
    """Who labels: of a session its own name, else whom ``rater_id`` names."""
    rater = name_of(caller, named, "rater_id")
    if rater is None:
        text = "Missing required parameter: 'rater_id'; who is signed in may leave it out."
        raise InvalidRequestError(text, param="rater_id", code="missing_required_parameter")
    return rater


def _choices(group: Group, order: tuple[int, int]) -> list[QueueChoice]:
    return [QueueChoice(index=index, text=group.completions[index].text) for index in order]


def _gold(item: Gold) -> GoldResource:
    return GoldResource(
        id=item.group_id,
        chosen_index=_LABELS.index(item.label),
        origin=item.origin.value,
        reason=item.reason,
        created_at=seconds(item.created_at),
    )
