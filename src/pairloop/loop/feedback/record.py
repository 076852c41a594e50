"""What all feedback shares: rows are judged against their group inside the transaction that writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

from sqlalchemy import Connection

from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError, UserError
from pairloop.store import Store, Together, feedback
from pairloop.store.heads import GroupHead, heads
from pairloop.types import PREFERENCE_METRIC, Feedback, Group, GroupKind, Label

EDIT_SUFFIX = "-edit"


@dataclass(frozen=True, slots=True)
class Recorded:
    """The row as stored (or as it would be), and its group; ``versions`` by index once a duel's pick has been made."""

    feedback: Feedback
    group: GroupHead
    duplicate: bool
    dryrun: bool = False

    @property
    def versions(self) -> tuple[int | None, ...] | None:
        reveals = self.feedback.metric == PREFERENCE_METRIC and self.feedback.label is not Label.SKIP
        if self.dryrun or (self.group.kind is GroupKind.DUEL and not reveals):
            return None
        return self.group.versions


class RowsOf(Protocol):
    """What turns a request into rows once its group is known; the first row is the one that is answered for."""

    def __call__(self, group: GroupHead) -> tuple[Feedback, ...]: ...


def is_revealed(c: Connection, group: Group) -> bool:
    """Whether the versions behind a group may be told: always, but for a duel only once someone has picked (and for good)."""
    if group.kind is not GroupKind.DUEL:
        return True
    rows = feedback.history(c, group.group_id)
    return any(row.metric == PREFERENCE_METRIC and row.label is not Label.SKIP for row in rows)


@dataclass(frozen=True, slots=True)
class Draft:
    """A request on its way: ``rows_of`` its group makes its rows, ``given_id``: an id that its client chose."""

    inference_id: str
    rows_of: RowsOf
    given_id: str | None
    dryrun: bool

    def write(self, c: Connection) -> Recorded:
        """On its own: whatever it is, a replay, a revision, or what is to be refused."""
        group = pickable(c, self.inference_id)
        rows = self.rows_of(group)
        if self.dryrun:
            return Recorded(rows[0], group, duplicate=False, dryrun=True)
        written = [feedback.insert(c, row) for row in rows]
        row, duplicate = written[0]
        if duplicate:
            _check_replay(c, row.feedback_id, [known for _, known in written])
        return Recorded(row, group, duplicate)


def redacting(store: Store, rows_of: RowsOf) -> RowsOf:
    """``rows_of``, without the personal data that this store does not keep."""
    redactor = store.redactor
    if redactor is None:
        return rows_of
    return lambda group: tuple(redactor.feedback(row) for row in rows_of(group))


def submit(store: Store, draft: Draft) -> Future[Recorded]:
    draft = replace(draft, rows_of=redacting(store, draft.rows_of))
    return store.submit(draft.write, together=None if draft.dryrun else Together(write_new, draft))


def write_new(c: Connection, drafts: Sequence[Draft]) -> list[Recorded | None]:
    """All that is plainly new, in one statement of each kind; None for the rest, which goes the way of ``Draft.write``."""
    found = heads(c, {draft.inference_id for draft in drafts})
    taken = feedback.known_ids(c, {draft.given_id for draft in drafts if draft.given_id is not None})
    revisions = feedback.last_revisions(c, found)
    recorded: list[Recorded | None] = []
    new: list[tuple[Feedback, str]] = []
    said: set[tuple[str, str, str, int | None]] = set()
    for draft in drafts:
        head = found.get(draft.inference_id)
        rows = () if head is None else _rows(draft, head)
        keys = {_key(row) for row in rows}
        if head is None or not rows or draft.given_id in taken or keys & said:
            recorded.append(None)
            continue
        said |= keys
        if draft.given_id is not None:
            taken.add(draft.given_id)
        numbered = [replace(row, revision=last + 1) if (last := revisions.get(_key(row))) is not None else row for row in rows]
        new += [(row, head.policy) for row in numbered]
        recorded.append(Recorded(numbered[0], head, duplicate=False))
    feedback.insert_new(c, [row for row, _ in new], [policy for _, policy in new])
    return recorded


def _key(row: Feedback) -> tuple[str, str, str, int | None]:
    """What a later row with the same key revises."""
    return row.group_id, row.rater_id, row.metric, row.choice_index


def _rows(draft: Draft, head: GroupHead) -> tuple[Feedback, ...]:
    """None where there is something to refuse."""
    if head.is_abandoned or not _is_answer(head):
        return ()
    try:
        return draft.rows_of(head)
    except UserError:
        return ()


def _check_replay(c: Connection, feedback_id: str, known: list[bool]) -> None:
    """The edited text is a row of its own; a replay must bring it, or leave it out, as the first time."""
    edited_then, edited_now = feedback.get(c, feedback_id + EDIT_SUFFIX) is not None, len(known) > 1
    if edited_then != edited_now or not all(known):
        raise ConflictError(f"feedback {feedback_id} exists with another body (its edited_text differs)")


def waited_for(future: Future[Recorded], notify: Callable[[], None] | None) -> Recorded:
    recorded = future.result()
    if notify is not None and not recorded.duplicate and not recorded.dryrun:
        notify()
    return recorded


def pickable(c: Connection, inference_id: str) -> GroupHead:
    group = heads(c, [inference_id]).get(inference_id)
    if group is None or not _is_answer(group):
        raise NotFoundError(
            f"no inference {inference_id!r}; send the id of a chat completion of this server", param="inference_id"
        )
    if group.is_abandoned:
        raise ConflictError(f"{inference_id} was never answered to its end (its client went away), so it takes no feedback")
    return group


def _is_answer(group: GroupHead) -> bool:
    """Whether somebody was shown it, and it is still there."""
    return not group.is_erased and group.kind is not GroupKind.SHADOW


def checked_text(value: object, param: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(f"{param} must be text that is not blank", param=param)
    return value
