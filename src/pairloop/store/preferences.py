"""Preferences: the groups that somebody said something about, newest word first, by filters; and how many there are of each.

One look goes through the newest `WINDOW` of them and says where it stopped, so that its cost does not grow with the store;
``next`` goes on from there, and `pairloop.store.searches` through all of them. Words are looked for in the texts themselves. A
full-text index would be written with each group: of SQLite's FTS5 that was measured to double the work of a chat's insert (118
to 238 µs) and the file, and before SQLite 3.42 what is erased stays readable in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection, Subquery
from sqlalchemy.dialects.postgresql import JSONB

from pairloop.store.feedback import is_latest, max_seq
from pairloop.store.groups import ERASED_HASH
from pairloop.store.marks import Mark, is_marked
from pairloop.store.outcomes import has_trained
from pairloop.store.schema import completions, feedback, groups, pair_groups, set_aside
from pairloop.types import PREFERENCE_METRIC, GroupKind, Label, Pool

WINDOW = 5_000
"""So many groups with feedback are looked through at a time: some 60 ms."""
MAX_TERMS = 8

_TERM = re.compile(r'"([^"]+)"|(\S+)')


class State(StrEnum):
    """What became of a group's feedback. ``excluded`` may stand beside another one."""

    WAITING = "waiting"
    """No dataset has looked at it yet."""
    LEFT_OUT = "left_out"
    KEPT = "kept"
    """In a dataset of which no version was trained so far, or which holds it out to measure its versions."""
    TRAINED = "trained"
    EXCLUDED = "excluded"
    """Not to be trained on, an operator decided."""
    JUDGED = "judged"
    """A duel's: it judged a version, and is never trained on."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which groups; None does not matter. What is asked of a vote is asked of one and the same vote.

    Of the group: ``search`` (all of these words, "quoted ones" as they stand, in prompt or answers), ``kind``, ``pool``,
    ``version`` (of an answer), ``state``, ``since`` and ``until`` (its newest vote's time). Of a vote that counts: ``label``,
    ``source``, ``metric``, ``rater``, ``reason`` (why it was left out).
    """

    search: str | None = None
    label: str | None = None
    source: str | None = None
    metric: str | None = None
    rater: str | None = None
    reason: str | None = None
    kind: str | None = None
    pool: str | None = None
    version: int | None = None
    state: State | None = None
    since: datetime | None = None
    until: datetime | None = None


class Place(NamedTuple):
    """A place in the listing as it was when feedback number ``top`` was the newest: behind feedback number ``before``."""

    top: int
    before: int


class Listed(NamedTuple):
    """Ids in order; ``next`` is where to go on, with ``is_cut`` where no group stands there but the look ended."""

    group_ids: list[str]
    next: Place | None
    is_cut: bool
    looked: int
    """Through so many; 0 where the look ended at ``limit`` groups."""


class Counted(NamedTuple):
    """Groups by facet and value, among those ``looked`` through; ``next``: behind them, None once the oldest was reached."""

    groups: int
    facets: Mapping[str, Mapping[str, int]]
    looked: int
    next: Place | None

    @property
    def is_cut(self) -> bool:
        return self.next is not None


def first(c: Connection, policy: str) -> Place:
    """Before everything there is now."""
    top = max_seq(c, policy)
    return Place(top, top + 1)


def page(c: Connection, policy: str, wanted: Wanted, at: Place, limit: int, window: int = WINDOW) -> Listed:
    """At most ``limit`` groups of one look from ``at``, which goes through ``window`` groups."""
    looked_at = _window(policy, wanted, at, window)
    statement = (
        sa.select(looked_at.c.seq, looked_at.c.group_id)
        .select_from(looked_at.join(groups, groups.c.group_id == looked_at.c.group_id))
        .where(*_conditions(c, policy, wanted, looked_at.c.group_id))
    )
    rows = c.execute(statement.order_by(looked_at.c.seq.desc()).limit(limit + 1)).all()
    ids = [row.group_id for row in rows[:limit]]
    if len(rows) > limit:
        return Listed(ids, Place(at.top, rows[limit - 1].seq), is_cut=False, looked=0)
    seen, last = _extent(c, looked_at)
    return Listed(ids, Place(at.top, last) if seen == window else None, is_cut=seen == window, looked=seen)


def page_counted(
    c: Connection, policy: str, wanted: Wanted, at: Place, limit: int, window: int = WINDOW
) -> tuple[Listed, Counted]:
    """`page` and `counted` of the same look: where nothing is listed, nothing need be looked for again to be counted."""
    listed = page(c, policy, wanted, at, limit, window)
    if not listed.group_ids:
        return listed, Counted(0, {}, listed.looked, listed.next)
    return listed, counted(c, policy, wanted, at, window)


def each(c: Connection, policy: str, wanted: Wanted, at: Place, window: int = WINDOW) -> Iterator[list[str]]:
    """All that follow ``at``, look by look."""
    place: Place | None = at
    while place is not None:
        found = page(c, policy, wanted, place, window, window)
        if found.group_ids:
            yield found.group_ids
        place = found.next


def counted(c: Connection, policy: str, wanted: Wanted, at: Place, window: int = WINDOW) -> Counted:
    """How many there are in one look from ``at``, and of each value of each facet. One statement, one pass."""
    looked_at = _window(policy, wanted, at, window)
    matched = (
        sa.select(looked_at.c.group_id, groups.c.kind, groups.c.pool)
        .select_from(looked_at.join(groups, groups.c.group_id == looked_at.c.group_id))
        .where(*_conditions(c, policy, wanted, looked_at.c.group_id))
        .cte("matched")
    )
    facets: dict[str, dict[str, int]] = {}
    for facet, value, n in c.execute(sa.union_all(*_facets(matched, policy, wanted))):
        if n and value is not None:
            facets.setdefault(facet, {})[str(value)] = n
    total = facets.pop("all", {}).get("all", 0)
    seen, last = _extent(c, looked_at)
    return Counted(total, facets, seen, Place(at.top, last) if seen == window else None)


def there_are(c: Connection, policy: str, wanted: Wanted, at: Place) -> int:
    """How many groups looks from ``at`` would go through to the end. Reads an index of all feedback."""
    return c.execute(sa.select(sa.func.count()).select_from(_heads(policy, wanted, at).subquery())).scalar_one()


def _facets(matched: sa.CTE, policy: str, wanted: Wanted) -> Iterator[sa.Select[str, str, int]]:
    n: ColumnElement[int] = sa.func.count()
    yield sa.select(sa.literal("all"), sa.literal("all"), n).select_from(matched)
    for name in ("kind", "pool"):
        yield sa.select(sa.literal(name), matched.c[name], n).group_by(matched.c[name])
    said = matched.join(feedback, feedback.c.group_id == matched.c.group_id)
    distinct = sa.func.count(feedback.c.group_id.distinct())
    for column in (feedback.c.label, feedback.c.source, feedback.c.metric):
        votes = sa.select(sa.literal(column.name), column, distinct).select_from(said).where(*_of_a_vote(wanted))
        yield votes.group_by(column)
    aside = said.join(set_aside, set_aside.c.feedback_id == feedback.c.feedback_id)
    reasons = sa.select(sa.literal("reason"), set_aside.c.reason, distinct).select_from(aside).where(*_of_a_vote(wanted))
    yield reasons.group_by(set_aside.c.reason)
    answers = matched.join(completions, completions.c.group_id == matched.c.group_id)
    of_version = sa.func.count(matched.c.group_id.distinct())
    version = sa.cast(completions.c.version, sa.Text)
    by_version = sa.select(sa.literal("version"), version, of_version).select_from(answers)
    yield by_version.where(_is_told(matched.c.kind, matched.c.group_id)).group_by(completions.c.version)
    for state in State:
        is_so = _is_in(state, policy, matched)
        yield sa.select(sa.literal("state"), sa.literal(state.value), n).select_from(matched).where(is_so)


def _window(policy: str, wanted: Wanted, at: Place, window: int) -> Subquery:
    """The newest of `_heads`."""
    heads = _heads(policy, wanted, at)
    return heads.order_by(heads.selected_columns.seq.desc()).limit(window).subquery("looked_at")


def _heads(policy: str, wanted: Wanted, at: Place) -> sa.Select[int, str]:
    """The groups with feedback behind a place, each with the number of its newest row by ``top``."""
    head, later = feedback.alias("head"), feedback.alias("later")
    newer = sa.exists().where(later.c.group_id == head.c.group_id, later.c.seq > head.c.seq, later.c.seq <= at.top)
    statement = sa.select(head.c.seq, head.c.group_id).where(head.c.policy == policy, head.c.seq < at.before, ~newer)
    if at.before > at.top:
        statement = statement.where(head.c.seq <= at.top)
    if wanted.since is not None:
        statement = statement.where(head.c.created_at >= wanted.since)
    if wanted.until is not None:
        statement = statement.where(head.c.created_at < wanted.until)
    return statement


def _extent(c: Connection, window: Subquery) -> tuple[int, int]:
    """How many groups a look goes through, and the number of the last one's row."""
    n, last = c.execute(sa.select(sa.func.count(), sa.func.min(window.c.seq))).one()
    return n, last or 0


def _conditions(c: Connection, policy: str, wanted: Wanted, group_id: ColumnElement[str]) -> Iterator[ColumnElement[bool]]:
    yield groups.c.prompt_hash != ERASED_HASH
    if wanted.kind is not None:
        yield groups.c.kind == wanted.kind
    if wanted.pool is not None:
        yield groups.c.pool == wanted.pool
    if any(value is not None for value in (wanted.label, wanted.source, wanted.metric, wanted.rater, wanted.reason)):
        yield sa.exists().where(feedback.c.group_id == group_id, *_of_a_vote(wanted))
    if wanted.version is not None:
        yield sa.exists().where(completions.c.group_id == group_id, completions.c.version == wanted.version)
        yield _is_told(groups.c.kind, group_id)
    if wanted.state is not None:
        yield _is_in(wanted.state, policy, groups)
    for term in terms(wanted.search or ""):
        yield _says(c.dialect.name, term, group_id)


def _is_told(kind: ColumnElement[str], group_id: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether its versions may be told (`loop.feedback.is_revealed`): of a duel once somebody has picked."""
    picked = (feedback.c.metric == PREFERENCE_METRIC, feedback.c.label != Label.SKIP.value)
    return sa.or_(kind != GroupKind.DUEL.value, sa.exists().where(feedback.c.group_id == group_id, *picked))


def _of_a_vote(wanted: Wanted) -> Iterator[ColumnElement[bool]]:
    yield is_latest()
    for column in (feedback.c.label, feedback.c.source, feedback.c.metric):
        value = getattr(wanted, column.name)
        if value is not None:
            yield column == value
    if wanted.label is not None:
        yield feedback.c.metric == PREFERENCE_METRIC
    if wanted.rater is not None:
        yield feedback.c.rater_id == wanted.rater
    if wanted.reason is not None:
        why = set_aside.alias("why")
        yield sa.exists().where(why.c.feedback_id == feedback.c.feedback_id, why.c.reason == wanted.reason)


def _is_in(state: State, policy: str, of: sa.FromClause) -> ColumnElement[bool]:
    """Only what this state needs is built: a statement of facets asks for all six."""
    group_id, is_duel = of.c.group_id, of.c.kind == GroupKind.DUEL.value
    if state is State.JUDGED:
        return is_duel
    if state is State.EXCLUDED:
        return is_marked(group_id, Mark.EXCLUDED)
    if state in (State.TRAINED, State.KEPT):
        trained = sa.and_(of.c.pool == Pool.TRAIN.value, has_trained(policy, group_id))
        return trained if state is State.TRAINED else sa.and_(_in_pair(group_id), ~trained)
    row = feedback.alias("row")
    aside = sa.exists().where(row.c.group_id == group_id, set_aside.c.feedback_id == row.c.feedback_id)
    in_none = ~_in_pair(group_id)
    return sa.and_(in_none, ~aside, ~is_duel) if state is State.WAITING else sa.and_(in_none, aside)


def _in_pair(group_id: ColumnElement[str]) -> ColumnElement[bool]:
    return sa.exists().where(pair_groups.c.group_id == group_id)


def terms(search: str) -> list[str]:
    """The words of a search, and its quoted phrases; at most `MAX_TERMS`."""
    return [quoted or word for quoted, word in _TERM.findall(search)][:MAX_TERMS]


def _says(dialect: str, term: str, group_id: ColumnElement[str]) -> ColumnElement[bool]:
    """The prompt or an answer has the term in it, whatever its case."""
    like = _like(dialect, term)
    answers = sa.exists().where(completions.c.group_id == group_id, like(completions.c.text))
    if dialect == "sqlite":
        told = sa.func.json_tree(groups.c.prompt).table_valued("key", "type", "value", name="told")
        is_content = sa.or_(told.c.key == "content", told.c.key.is_(None))
        turns: ColumnElement[bool] = sa.exists(
            sa.select(1).select_from(told).where(is_content, told.c.type == "text", like(told.c.value))
        )
    else:
        whole = sa.func.jsonb_path_query(sa.cast(groups.c.prompt, JSONB), sa.literal_column("CAST('$.**.content' AS jsonpath)"))
        told = whole.table_valued("value", name="told").render_derived()
        contents = sa.exists(sa.select(1).select_from(told).where(like(_text(told.c.value))))
        is_text = sa.func.json_typeof(groups.c.prompt) == "string"
        turns = sa.or_(sa.and_(is_text, like(_text(groups.c.prompt))), contents)
    if term.isascii():  # the JSON, keys and all, is looked at first: most of it need not be read then
        turns = sa.and_(_like(dialect, json.dumps(term)[1:-1])(sa.cast(groups.c.prompt, sa.Text)), turns)
    return sa.or_(turns, answers)


def _text(value: ColumnElement[Any]) -> ColumnElement[str]:
    """A JSON text as text, in PostgreSQL."""
    return value.op("#>>", return_type=sa.Text())(sa.literal_column("'{}'"))


def _like(dialect: str, term: str) -> Callable[[ColumnElement[str]], ColumnElement[bool]]:
    """A condition on a text: it has the term in it. SQLite knows the case of ASCII letters alone, and is given the others."""
    escaped = re.sub(r"([/%_])", r"/\1", term)
    if dialect != "sqlite":
        return lambda column: column.ilike(f"%{escaped}%", escape="/")
    spellings = [escaped] if term.isascii() else [escaped, escaped.lower(), escaped.upper(), escaped.capitalize()]
    return lambda column: sa.or_(*(column.like(f"%{one}%", escape="/") for one in dict.fromkeys(spellings)))
