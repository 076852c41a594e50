"""Groups and their completions: written once, read by whoever picks, pairs, labels or evaluates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row, Select

from pairloop.errors import ConflictError, NotFoundError
from pairloop.store.schema import completions, feedback, groups
from pairloop.types import Completion, FinishReason, Group, GroupKind, Message, Pool, Prompt, SamplingParams

# Built once: building a statement costs more than running it.
_INSERT_GROUP = sa.insert(groups)
_INSERT_COMPLETIONS = sa.insert(completions)
_GET = sa.select(groups).where(groups.c.group_id == sa.bindparam("group_id"))
_COMPLETIONS_OF = (
    sa.select(completions).where(completions.c.group_id == sa.bindparam("group_id")).order_by(completions.c.position)
)
_HEADER = (
    sa.select(groups.c.policy, groups.c.user, groups.c.created_at, sa.func.count(completions.c.position).label("n"))
    .select_from(groups.outerjoin(completions))
    .where(groups.c.group_id == sa.bindparam("group_id"))
    .group_by(groups.c.group_id, groups.c.policy, groups.c.user, groups.c.created_at)
)
_LATEST_ANSWER = (
    sa.select(completions.c.group_id, completions.c.position)
    .where(completions.c.answer_key == sa.bindparam("answer_key"))
    .order_by(completions.c.created_at.desc(), completions.c.group_id.desc(), completions.c.position)
    .limit(1)
)
_COMPLETIONS_IN = (
    sa.select(completions)
    .where(completions.c.group_id.in_(sa.bindparam("group_ids", expanding=True)))
    .order_by(completions.c.group_id, completions.c.position)
)

_SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))

_WITHOUT_TEXT = [FinishReason.ABANDONED.value, FinishReason.ERASED.value]

ERASED_HASH = ""
"""What stands where a hash of an erased text stood: no text has it."""

NO_NUL = "\N{REPLACEMENT CHARACTER}"
"""What stands in a text where a model sampled a NUL: PostgreSQL stores none. The token ids are kept as they were sampled."""

ID_CHUNK = 500
"""Ids per IN list: databases bound the number of parameters."""


def insert(c: Connection, group: Group) -> None:
    """Write the group with its completions; with none (a stream that begins), ``finish`` appends them."""
    c.execute(_INSERT_GROUP, _group_row(group))
    asker = None if group.kind is GroupKind.SHADOW else group.user  # no conversation goes on from what nobody was told
    _insert_completions(c, group.group_id, group.policy, asker, group.created_at, group.completions)


def finish(c: Connection, group_id: str, answers: tuple[Completion, ...]) -> None:
    """Append the completions of a streamed group, once; NotFoundError, or ConflictError where it has them already."""
    header = c.execute(_HEADER, {"group_id": group_id}).first()
    if header is None:
        raise NotFoundError(f"no group {group_id}", param="group_id")
    if header.n:
        raise ConflictError(f"group {group_id} has its completions already; a group is written once")
    _insert_completions(c, group_id, header.policy, header.user, header.created_at, answers)


def get(c: Connection, group_id: str) -> Group | None:
    row = c.execute(_GET, {"group_id": group_id}).first()
    if row is None:
        return None
    return _group(row, c.execute(_COMPLETIONS_OF, {"group_id": group_id}))


def latest_answer(c: Connection, policy: str, user: str | None, text: str) -> tuple[str, int] | None:
    """(group_id, index) of that user's newest completion with exactly this text: what a conversation goes on from."""
    row = c.execute(_LATEST_ANSWER, {"answer_key": _answer_key(policy, user, text)}).first()
    return None if row is None else (row.group_id, row.position)


def shadow_id(group_id: str) -> str:
    """The id of what another version would have said in that group's place."""
    return f"{group_id}-shadow"


def of_conversation(c: Connection, conversation_id: str, *, limit: int) -> list[Group]:
    """The groups of a conversation, oldest first; at most ``limit``."""
    shown = groups.c.kind != GroupKind.SHADOW.value
    statement = sa.select(groups).where(groups.c.conversation_id == conversation_id, shown)
    return load(c, statement.order_by(groups.c.created_at, groups.c.group_id).limit(limit))


def of_duel(c: Connection, duel_id: str, *, limit: int) -> list[Group]:
    """The newest groups of a duel that were answered and not erased, newest first; at most ``limit``."""
    whole = sa.exists().where(completions.c.group_id == groups.c.group_id, completions.c.finish_reason.not_in(_WITHOUT_TEXT))
    statement = sa.select(groups).where(groups.c.duel_id == duel_id, whole)
    return load(c, statement.order_by(groups.c.created_at.desc(), groups.c.group_id.desc()).limit(limit))


def erase(c: Connection, group_ids: Sequence[str], *, with_user: bool = False) -> None:
    """Remove what was asked and answered, and the words that were said about it, for good.

    In the shadow, too. Which versions answered stays, and so do labels and numbers: a duel's votes keep their sides.
    ``with_user``: nor who asked, in which conversation.
    """
    nobody = {"user": None, "conversation_id": None} if with_user else {}
    for ids in chunked([*group_ids, *map(shadow_id, group_ids)]):
        c.execute(
            sa.update(groups)
            .where(groups.c.group_id.in_(ids))
            .values(prompt="", prompt_hash=ERASED_HASH, prompt_token_ids=(), metadata={}, **nobody)
        )
        c.execute(
            sa.update(completions)
            .where(completions.c.group_id.in_(ids))
            .values(text="", token_ids=(), logps=(), answer_key=ERASED_HASH, finish_reason=FinishReason.ERASED.value)
        )
        c.execute(sa.update(feedback).where(feedback.c.group_id.in_(ids)).values(text=None, tags={}))
        has_words = sa.func.substr(sa.cast(feedback.c.value, sa.Text), 1, 1) == '"'  # JSON: numbers and booleans stay
        c.execute(sa.update(feedback).where(feedback.c.group_id.in_(ids), has_words).values(value=None))


def unlabelled(
    c: Connection,
    policy: str,
    *,
    pool: Pool | None,
    before: datetime,
    limit: int,
    kinds: Collection[GroupKind],
    min_completions: int = 1,
) -> list[Group]:
    """Whole groups of at least so many completions, made before ``before``, that have no feedback at all; oldest first."""
    answer = completions.alias()
    statement = sa.select(groups).where(
        groups.c.policy == policy,
        groups.c.created_at < before,
        groups.c.kind.in_([kind.value for kind in kinds]),
        ~sa.exists().where(feedback.c.group_id == groups.c.group_id),
        sa.exists().where(completions.c.group_id == groups.c.group_id, completions.c.position == min_completions - 1),
        ~sa.exists().where(sa.and_(answer.c.group_id == groups.c.group_id, answer.c.finish_reason.in_(_WITHOUT_TEXT))),
    )
    if pool is not None:
        statement = statement.where(groups.c.pool == pool.value)
    return load(c, statement.order_by(groups.c.created_at, groups.c.group_id).limit(limit))


def recent_prompts(c: Connection, policy: str, *, pool: Pool, limit: int) -> list[Group]:
    """The newest group of each of the ``limit`` newest distinct prompts, newest first."""
    statement = (
        sa.select(groups.c.group_id, groups.c.prompt_hash)
        .where(groups.c.policy == policy, groups.c.pool == pool.value, groups.c.prompt_hash != ERASED_HASH)
        .order_by(groups.c.created_at.desc(), groups.c.group_id.desc())
    )
    newest: dict[str, str] = {}
    # Read row by row, so that the search ends with the last prompt that is needed.
    with c.execute(statement, execution_options={"yield_per": 256}) as rows:
        for row in rows:
            if len(newest) >= limit:
                break
            newest.setdefault(row.prompt_hash, row.group_id)
    by_id = {group.group_id: group for group in load_ids(c, newest.values())}
    return [by_id[group_id] for group_id in newest.values()]


def count(c: Connection, policy: str) -> int:
    return c.execute(sa.select(sa.func.count()).select_from(groups).where(groups.c.policy == policy)).scalar_one()


def load(c: Connection, statement: Select[Any]) -> list[Group]:
    """The groups of a select over the groups table, in its order, with their completions."""
    rows = c.execute(statement).all()
    answers: dict[str, list[Row[Any]]] = {row.group_id: [] for row in rows}
    for ids in chunked(list(answers)):
        for answer in c.execute(_COMPLETIONS_IN, {"group_ids": ids}):
            answers[answer.group_id].append(answer)
    return [_group(row, answers[row.group_id]) for row in rows]


def load_ids(c: Connection, group_ids: Iterable[str]) -> list[Group]:
    """The groups with these ids, oldest first."""
    found: list[Group] = []
    for ids in chunked(list(group_ids)):
        found += load(c, sa.select(groups).where(groups.c.group_id.in_(sa.bindparam("ids", ids, expanding=True))))
    return sorted(found, key=lambda group: (group.created_at, group.group_id))


def chunked(ids: Sequence[str]) -> Iterable[list[str]]:
    return (list(ids[start : start + ID_CHUNK]) for start in range(0, len(ids), ID_CHUNK))


def _insert_completions(
    c: Connection, group_id: str, policy: str, user: str | None, created_at: datetime, answers: tuple[Completion, ...]
) -> None:
    if answers:
        rows = [
            {
                "group_id": group_id,
                "position": position,
                "text": answer.text.replace("\0", NO_NUL),
                "token_ids": answer.token_ids,
                "logps": answer.logps,
                "version": answer.version,
                "finish_reason": answer.finish_reason.value,
                "answer_key": _answer_key(policy, user, answer.text),
                "created_at": created_at,
                "first_token_ms": answer.first_token_ms,
                "total_ms": answer.total_ms,
            }
            for position, answer in enumerate(answers)
        ]
        if any(answer.is_redacted for answer in answers):  # NULL says no
            rows = [{**row, "is_redacted": answer.is_redacted} for row, answer in zip(rows, answers, strict=True)]
        c.execute(_INSERT_COMPLETIONS, rows)


def _group_row(group: Group) -> dict[str, Any]:
    prompt = _prompt_json(group.prompt)
    return {
        "group_id": group.group_id,
        "policy": group.policy,
        "kind": group.kind.value,
        "pool": group.pool.value,
        "prompt": prompt,
        "prompt_hash": _hash(prompt),
        "prompt_token_ids": group.prompt_token_ids,
        "sampling": {name: getattr(group.sampling, name) for name in _SAMPLING_FIELDS},
        "user": group.user,
        "conversation_id": group.conversation_id,
        "parent_group_id": group.parent_group_id,
        "parent_index": group.parent_index,
        "duel_id": group.duel_id,
        "metadata": dict(group.metadata),
        "created_at": group.created_at,
    }


def _group(row: Row[Any], answers: Iterable[Row[Any]]) -> Group:
    sampling = row.sampling
    return Group(
        group_id=row.group_id,
        policy=row.policy,
        kind=GroupKind(row.kind),
        pool=Pool(row.pool),
        prompt=_prompt(row.prompt),
        completions=tuple(_completion(answer) for answer in answers),
        created_at=row.created_at,
        prompt_token_ids=row.prompt_token_ids,
        sampling=SamplingParams(**{**sampling, "stop": tuple(sampling["stop"])}),
        user=row.user,
        conversation_id=row.conversation_id,
        parent_group_id=row.parent_group_id,
        parent_index=row.parent_index,
        duel_id=row.duel_id,
        metadata=row.metadata,
    )


def _completion(row: Row[Any]) -> Completion:
    return Completion(
        text=row.text,
        token_ids=row.token_ids,
        logps=row.logps,
        version=row.version,
        finish_reason=FinishReason(row.finish_reason),
        is_redacted=bool(row.is_redacted),
        first_token_ms=row.first_token_ms,
        total_ms=row.total_ms,
    )


def _prompt_json(prompt: Prompt) -> str | list[dict[str, Any]]:
    return prompt if isinstance(prompt, str) else [message.as_dict() for message in prompt]


def _prompt(stored: str | list[dict[str, Any]]) -> Prompt:
    return stored if isinstance(stored, str) else tuple(Message.from_dict(message) for message in stored)


def _answer_key(policy: str, user: str | None, text: str) -> str:
    return _hash([policy, user, text])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
