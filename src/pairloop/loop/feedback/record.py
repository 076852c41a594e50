"""What all feedback shares: rows are judged against their group inside the transaction that writes them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Connection

from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.store import Store, feedback, groups
from pairloop.types import PREFERENCE_METRIC, Feedback, Group, GroupKind, Label

EDIT_SUFFIX = "-edit"


@dataclass(frozen=True, slots=True)
class Recorded:
    """The row as stored (or as it would be), and its group; ``versions`` by index once a duel's pick has been made."""

    feedback: Feedback
    group: Group
    duplicate: bool
    dryrun: bool = False

    @property
    def versions(self) -> tuple[int | None, ...] | None:
        reveals = self.feedback.metric == PREFERENCE_METRIC and self.feedback.label is not Label.SKIP
        if self.dryrun or (self.group.kind is GroupKind.DUEL and not reveals):
            return None
        return tuple(completion.version for completion in self.group.completions)


class Draft(Protocol):
    """What turns a request into rows once its group is known; the first row is the one that is answered for."""

    def __call__(self, group: Group) -> tuple[Feedback, ...]: ...


def is_revealed(c: Connection, group: Group) -> bool:
    """Whether the versions behind a group may be told: always, but for a duel only once someone has picked (and for good)."""
    if group.kind is not GroupKind.DUEL:
        return True
    rows = feedback.history(c, group.group_id)
    return any(row.metric == PREFERENCE_METRIC and row.label is not Label.SKIP for row in rows)


def submit(store: Store, inference_id: str, draft: Draft, *, dryrun: bool) -> Future[Recorded]:
    def write(c: Connection) -> Recorded:
        group = pickable(c, inference_id)
        rows = draft(group)
        if dryrun:
            return Recorded(rows[0], group, duplicate=False, dryrun=True)
        written = [feedback.insert(c, row) for row in rows]
        row, duplicate = written[0]
        if duplicate:
            _check_replay(c, row.feedback_id, [known for _, known in written])
        return Recorded(row, group, duplicate)

    return store.submit(write)


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


def pickable(c: Connection, inference_id: str) -> Group:
    group = groups.get(c, inference_id)
    if group is None or group.is_erased or group.kind is GroupKind.SHADOW:
        raise NotFoundError(
            f"no inference {inference_id!r}; send the id of a chat completion of this server", param="inference_id"
        )
    if group.is_abandoned:
        raise ConflictError(f"{inference_id} was never answered to its end (its client went away), so it takes no feedback")
    return group


def checked_text(value: object, param: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(f"{param} must be text that is not blank", param=param)
    return value
