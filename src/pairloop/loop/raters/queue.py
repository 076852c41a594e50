"""The labelling queue: the next comparison for a rater, held for them; now and then gold, or one of their own again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.loop.raters.desk import stored_id
from pairloop.loop.serve import pool_of
from pairloop.store import Store, groups, marks, new_id, queue, reservations
from pairloop.store.clock import shared_now
from pairloop.store.queue import Asking
from pairloop.store.reservations import ItemKind, Reservation
from pairloop.types import Group, Pool

CANDIDATES = 32
"""One of so many is drawn: raters who ask at the same time mostly get different ones."""
DRAWN = 4
"""New comparisons that are drawn at once, since others may take one meanwhile."""
TRIES = 4
"""Draws until the queue says that there is nothing, where all that was drawn is taken meanwhile."""


@dataclass(frozen=True, slots=True)
class Item:
    """A comparison to show: answer ``shown_order[0]`` first. A pick of one that ``is_repeat`` is sent as such."""

    group: Group
    shown_order: tuple[int, int]
    is_repeat: bool


@dataclass(frozen=True, slots=True)
class Held:
    """A comparison that is a rater's own for a while, to be shown as the reservation says."""

    reservation: Reservation
    group: Group


@dataclass(frozen=True, slots=True)
class _Draw:
    """What may be shown next, with the answer in the first place."""

    kind: ItemKind
    group: Group
    first_index: int
    is_sent: bool = False
    """Whether an operator sent it to the queue, whoever picked from it before."""


def next_item(store: Store, config: Config, rater_id: str, *, rng: random.Random, repeats_only: bool = False) -> Item | None:
    """What this rater should look at next; None where there is nothing. Nothing is held, and gold is not shown.

    New comparisons come from the rater's own pool, so that nobody who trains also judges; those that an operator sent here come
    first. A repeat comes with chance ``feedback.repeat_share``; with ``repeats_only`` nothing else does.
    """
    rater_id = stored_id(store, rater_id)
    with store.reading() as c:
        asking = _asking(c, config, rater_id)
        repeat = _repeat(c, config, asking, rng)
        found = repeat or (None if repeats_only else next(_new(c, config, asking, rng), None))
    if found is None:
        return None
    return Item(found.group, (found.first_index, 1 - found.first_index), found.kind is ItemKind.REPEAT)


def reserve(store: Store, config: Config, rater_id: str, *, rng: random.Random) -> Held | None:
    """The next comparison for this rater, theirs for ``queue.hold``; None where there is nothing.

    Who asks again before they answered gets the same. While there are new ones, gold is mixed in by ``queue.gold_share`` and
    their own again by ``feedback.repeat_share``.
    """
    rater_id = stored_id(store, rater_id)
    for _ in range(TRIES):
        with store.reading() as c:
            asking = _asking(c, config, rater_id)
            draws = list(_drawn(c, config, asking, rng))
        held = store.write(lambda c, draws=draws: _take(c, config, rater_id, draws))  # type: ignore[misc]
        if held is not None or not draws:
            return held
    return None


def _take(c: Connection, config: Config, rater_id: str, draws: list[_Draw]) -> Held | None:
    """What the rater holds already, else the first draw that nobody took meanwhile."""
    now = shared_now(c)
    reservations.sweep(c, now)
    mine = reservations.held(c, config.policy.name, rater_id, now)
    group = None if mine is None else groups.get(c, mine.group_id)
    if mine is not None and group is not None and not group.is_erased:
        return Held(mine, group)
    asking = Asking(config.policy.name, rater_id, config.queue.reviewers, now)
    for draw in draws:
        if draw.kind is not ItemKind.NEW or queue.has_room(c, asking, draw.group.group_id, is_sent=draw.is_sent):
            held = _reservation(config, rater_id, draw, now)
            reservations.insert(c, held)
            return Held(held, draw.group)
    return None


def _asking(c: Connection, config: Config, rater_id: str) -> Asking:
    return Asking(config.policy.name, rater_id, config.queue.reviewers, shared_now(c))


def _reservation(config: Config, rater_id: str, draw: _Draw, now: datetime) -> Reservation:
    return Reservation(
        reservation_id=new_id("reservation"),
        policy=config.policy.name,
        group_id=draw.group.group_id,
        rater_id=rater_id,
        kind=draw.kind,
        first_index=draw.first_index,
        created_at=now,
        expires_at=now + timedelta(seconds=config.queue.hold_s),
    )


def _drawn(c: Connection, config: Config, asking: Asking, rng: random.Random) -> Iterator[_Draw]:
    """What may be shown, the best first."""
    new = [draw for draw, _ in zip(_new(c, config, asking, rng), range(DRAWN), strict=False)]
    repeat = _repeat(c, config, asking, rng)
    if repeat is not None:
        yield repeat
    elif new and rng.random() < config.queue.gold_share:
        ids = queue.gold(c, config.policy.name, asking.rater_id, CANDIDATES)
        for group in _usable(c, rng.sample(ids, len(ids))):
            yield _Draw(ItemKind.GOLD, group, rng.randrange(2))
            break
    yield from new


def _new(c: Connection, config: Config, asking: Asking, rng: random.Random) -> Iterator[_Draw]:
    pool = pool_for(config, asking.rater_id)
    sent = marks.queued(c, config.policy.name, pool, asking.rater_id, CANDIDATES)
    for group in _usable(c, rng.sample(sent, len(sent))):
        if queue.has_room(c, asking, group.group_id, is_sent=True):
            yield _Draw(ItemKind.NEW, group, rng.randrange(2), is_sent=True)
    ids = queue.wanting(c, asking, pool, CANDIDATES)
    for group in _usable(c, rng.sample(ids, len(ids))):
        yield _Draw(ItemKind.NEW, group, rng.randrange(2))


def _repeat(c: Connection, config: Config, asking: Asking, rng: random.Random) -> _Draw | None:
    if rng.random() >= config.feedback.repeat_share:
        return None
    after = config.feedback.repeat_after
    found = queue.repeatable(c, config.policy.name, asking.rater_id, after=after, limit=CANDIDATES)
    shown = {one.group_id: one.shown_order for one in found}
    for group in _usable(c, rng.sample(list(shown), len(shown))):
        return _Draw(ItemKind.REPEAT, group, 0 if shown[group.group_id] == (1, 0) else 1)
    return None


def pool_for(config: Config, rater_id: str) -> Pool:
    """From which pool a rater's new comparisons come."""
    return pool_of(rater_id, config.serve.gate_share)


def _usable(c: Connection, group_ids: list[str]) -> Iterator[Group]:
    """Those of them that show two different whole answers, read one by one."""
    for group_id in group_ids:
        group = groups.get(c, group_id)
        if group is None or group.is_erased or group.is_abandoned or len(group.completions) != 2:
            continue
        if group.completions[0].text != group.completions[1].text:
            yield group
