"""Imported, not written: feedback exports of Open WebUI (Admin > Evaluations > Feedbacks > Export, a JSON array).

A row is one rating of one message (backend/open_webui/models/feedbacks.py: ``data.rating`` 1 or -1, ``data.sibling_model_ids``,
``meta.message_id``, ``user_id``) with a snapshot of its chat (``snapshot.chat.chat.history.messages``: by id, each with
``parentId``, ``childrenIds``, ``role``, ``content``; written by ResponseMessage.svelte). The prompt is the branch that leads to
the rated message, behind the chat's own system prompt (``params.system``).

Without sibling models a rating is a thumb. With some, it is a comparison, as Open WebUI's own leaderboard counts it
(backend/open_webui/routers/evaluations.py): a message rated 1 won against every sibling, one rated -1 lost to every sibling.
One sibling gives a pick, several give a group scored 1 and 0. ``data.comment`` stays beside the rating.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.formats import turns
from pairloop.formats.family import Family
from pairloop.formats.row import MISSING, Draft, Found, Mark, Row
from pairloop.types import PREFERENCE_METRIC, SCORE_METRIC, THUMBS_METRIC, Label, Message

_RATINGS = {"1": True, "-1": False}


def matches(row: Mapping[str, Any]) -> bool:
    return "snapshot" in row and "data" in row and "meta" in row


def parse(row: Row) -> Draft:
    data, meta = row.get(row.value, "$", "data"), row.get(row.value, "$", "meta")
    rating = _rating(row, data)
    chat, path = _chat(row)
    tree = row.get(row.get(chat, path, "history"), f"{path}.history", "messages")
    path = f"{path}.history.messages"
    message_id = row.get(meta, "$.meta", "message_id")
    if not isinstance(tree, Mapping) or not isinstance(message_id, str) or message_id not in tree:
        if tree is not MISSING and message_id is not MISSING:
            row.refuse(path, "missing_message", f"the snapshot does not hold the rated message {message_id!r}")
        return Draft(None, (), ())
    rated = tree[message_id]
    parent = rated.get("parentId") if isinstance(rated, Mapping) else None
    prompt = _prompt(row, path, chat, tree, parent)
    siblings = _siblings(row, path, tree, parent, message_id, data)
    found = [_answer(row, path, tree, place) for place in (message_id, *siblings)]
    texts = row.answers(found, distinct=len(siblings) == 1)
    return Draft(prompt, texts, _marks(row, data, rating, len(siblings)))


def _rating(row: Row, data: Any) -> bool | None:
    raw = row.get(data, "$.data", "rating")
    rating = _RATINGS.get(str(raw))
    if rating is None and raw is not MISSING:
        row.refuse("$.data.rating", "bad_label", f"a rating is 1 or -1, found {raw!r}")
    return rating


def _chat(row: Row) -> tuple[Any, str]:
    """The chat in the snapshot: of today, ``snapshot.chat`` is the stored row whose ``chat`` it is; once it was the chat."""
    outer = row.get(row.get(row.value, "$", "snapshot"), "$.snapshot", "chat")
    if isinstance(outer, Mapping) and "history" not in outer and "chat" in outer:
        return outer["chat"], "$.snapshot.chat.chat"
    return outer, "$.snapshot.chat"


def _prompt(row: Row, path: str, chat: Mapping[str, Any], tree: Mapping[str, Any], last: Any) -> tuple[Message, ...] | None:
    """The turns from the root of the chat to the message ``last``."""
    branch: list[Any] = []
    seen: set[str] = set()
    at = last
    while isinstance(at, str) and at not in seen and isinstance(tree.get(at), Mapping):
        seen.add(at)
        branch.append(tree[at])
        at = tree[at].get("parentId")
    if at is not None:
        row.refuse(path, "missing_message", f"the snapshot does not hold the message {at!r} that the rated one follows")
        return None
    params = chat.get("params")
    system = params.get("system") if isinstance(params, Mapping) else None
    opening = [{"role": "system", "content": system}] if system else []
    return turns.conversation(row, path, [*opening, *reversed(branch)])


def _siblings(row: Row, path: str, tree: Mapping[str, Any], parent: Any, rated: str, data: Any) -> list[str]:
    """Ids of the other answers to the same turn, where the rating compares models."""
    if not isinstance(data, Mapping) or not data.get("sibling_model_ids"):
        return []
    children = tree[parent].get("childrenIds") if isinstance(tree.get(parent), Mapping) else None
    others = [child for child in children or () if child != rated and child in tree]
    if not others:
        row.refuse(path, "missing_message", "the rating names sibling models, but the snapshot does not hold their messages")
    return others


def _answer(row: Row, path: str, tree: Mapping[str, Any], message_id: str) -> Found:
    return row.assistant_turn(f"{path}.{message_id}", tree[message_id])


def _marks(row: Row, data: Any, rating: bool | None, siblings: int) -> tuple[Mark, ...]:
    if rating is None:
        return ()
    user = row.value.get("user_id")
    rater = user if isinstance(user, str) and user.strip() else None
    raw = data.get("comment")
    comment = row.string("$.data.comment", raw) if isinstance(raw, str) and raw.strip() else None
    if not siblings:
        return (Mark(THUMBS_METRIC, choice_index=0, value=rating, rater_id=rater, text=comment),)
    if siblings == 1:
        return (Mark(PREFERENCE_METRIC, label=Label.A if rating else Label.B, rater_id=rater, text=comment),)
    scores = [float(rating), *[float(not rating)] * siblings]
    return tuple(
        Mark(SCORE_METRIC, choice_index=index, value=score, rater_id=rater, text=None if index else comment)
        for index, score in enumerate(scores)
    )


FAMILY = Family("open_webui", matches, parse)
