"""What a rater says of a comparison that the labelling queue held for them: the reservation knows what it counts for."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.loop.feedback.picks import Pick, pick_rows
from pairloop.loop.feedback.record import Recorded, pickable, redacting
from pairloop.loop.feedback.repeats import check_repeat
from pairloop.store import Store, feedback, reservations
from pairloop.store.ids import new_id
from pairloop.store.reservations import ItemKind, Reservation
from pairloop.types import GOLD_METRIC, PREFERENCE_METRIC, REPEAT_METRIC, Feedback, Source

_METRICS = {ItemKind.NEW: PREFERENCE_METRIC, ItemKind.GOLD: GOLD_METRIC, ItemKind.REPEAT: REPEAT_METRIC}


def submit_reserved(store: Store, pick: Pick, reservation_id: str, *, dryrun: bool = False) -> Future[Recorded]:
    """Record the pick as what it is: a vote, what is said of a gold item, or a repeat; a later one revises it.

    Order and rater are those of the reservation. A pick that comes after the hold ended counts as well: work is not lost.
    NotFoundError for an unknown reservation (they are kept for a day), ConflictError where it is about another comparison or
    another rater; else as ``submit_preference``.
    """
    if pick.source is not Source.HUMAN:
        raise InvalidRequestError("a reservation is a person's: leave source out", param="source")
    if pick.edited_text is not None:
        raise InvalidRequestError("a pick with a reservation takes no edited_text", param="edited_text")
    feedback_id, now = pick.feedback_id or new_id("feedback"), datetime.now(UTC)
    rows_of = redacting(store, lambda group: pick_rows(group, pick, feedback_id, now))

    def write(c: Connection) -> Recorded:
        held = reservations.get(c, reservation_id)
        if held is None:
            raise NotFoundError(
                f"no reservation {reservation_id!r}; it ends a day after its hold: take a new one", param="reservation_id"
            )
        group = pickable(c, pick.inference_id)
        row = _as_held(rows_of(group)[0], held, named=pick.rater_id is not None)
        if held.kind is ItemKind.REPEAT:
            check_repeat(c, row)
        if dryrun:
            return Recorded(row, group, duplicate=False, dryrun=True)
        stored, duplicate = feedback.insert(c, row)
        reservations.finish(c, reservation_id, now)
        return Recorded(stored, group, duplicate)

    return store.submit(write)


def _as_held(row: Feedback, held: Reservation, *, named: bool) -> Feedback:
    if row.group_id != held.group_id:
        raise ConflictError(f"reservation {held.reservation_id} is for {held.group_id}, not for {row.group_id}")
    if named and row.rater_id != held.rater_id:
        raise ConflictError(f"reservation {held.reservation_id} is of another rater")
    if row.shown_order and row.shown_order != held.shown_order:
        raise ConflictError(f"reservation {held.reservation_id} shows the answers in the order {list(held.shown_order)}")
    return replace(row, metric=_METRICS[held.kind], rater_id=held.rater_id, shown_order=held.shown_order)
