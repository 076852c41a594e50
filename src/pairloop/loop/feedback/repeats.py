"""A comparison that was shown to its rater once more, sides swapped: what they say now is no vote, it measures flips."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop.errors import ConflictError, InvalidRequestError
from pairloop.loop.feedback.picks import Pick, pick_rows
from pairloop.loop.feedback.record import Recorded, pickable, redacting
from pairloop.store import Store, feedback
from pairloop.store.ids import new_id
from pairloop.types import PREFERENCE_METRIC, REPEAT_METRIC, Feedback, Label, Source


def submit_repeat(store: Store, pick: Pick, *, dryrun: bool = False) -> Future[Recorded]:
    """Record a repeat; a replay changes nothing. The future resolves after the fsynced commit.

    InvalidRequestError for one without ``rater_id`` or ``shown_order``, or that is not a person's choice between the two;
    ConflictError where the rater made no decisive pick here before, or was shown the same order; else as ``submit_preference``.
    """
    for name in ("rater_id", "shown_order"):
        if not getattr(pick, name):
            raise InvalidRequestError(f"a repeat names its {name}", param=name)
    if pick.source is not Source.HUMAN:
        raise InvalidRequestError("a repeat is a person's: leave source out", param="source")
    if pick.edited_text is not None:
        raise InvalidRequestError("a repeat takes no edited_text; send it with a pick", param="edited_text")
    feedback_id, now = pick.feedback_id or new_id("feedback"), datetime.now(UTC)
    rows_of = redacting(store, lambda group: pick_rows(group, pick, feedback_id, now))

    def write(c: Connection) -> Recorded:
        group = pickable(c, pick.inference_id)
        row = replace(rows_of(group)[0], metric=REPEAT_METRIC)
        check_repeat(c, row)
        if dryrun:
            return Recorded(row, group, duplicate=False, dryrun=True)
        stored, duplicate = feedback.insert(c, row)
        return Recorded(stored, group, duplicate)

    return store.submit(write)


def check_repeat(c: Connection, repeat: Feedback) -> None:
    """ConflictError where this rater did not choose here before, or was shown the same order."""
    earlier = [
        row
        for row in feedback.history(c, repeat.group_id)
        if row.metric == PREFERENCE_METRIC and row.rater_id == repeat.rater_id and row.revision == 0
    ]
    about = f"rater {repeat.rater_id!r}", repeat.group_id
    if not earlier or earlier[0].label not in (Label.A, Label.B):
        raise ConflictError(f"{about[0]} has not chosen between the answers of {about[1]} before")
    if (earlier[0].shown_order or (0, 1)) == repeat.shown_order:
        raise ConflictError(f"{about[0]} was shown {about[1]} in this order before; a repeat swaps the sides")
