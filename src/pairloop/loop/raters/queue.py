"""The labelling queue: the next comparison for a rater, now and then one that they picked from before, sides swapped."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.loop.serve import pool_of
from pairloop.store import Store, groups, marks, queue
from pairloop.types import Group

CANDIDATES = 32
"""One of so many is drawn: raters who ask at the same time mostly get different ones."""


@dataclass(frozen=True, slots=True)
class Item:
    """A comparison to show: answer ``shown_order[0]`` first. A pick of one that ``is_repeat`` is sent as such."""

    group: Group
    shown_order: tuple[int, int]
    is_repeat: bool


def next_item(store: Store, config: Config, rater_id: str, *, rng: random.Random, repeats_only: bool = False) -> Item | None:
    """What this rater should look at next; None where there is nothing.

    New comparisons come from the rater's own pool, so that nobody who trains also judges; those that an operator sent here come
    first. A repeat comes with chance
    ``feedback.repeat_share``; with ``repeats_only`` nothing else does.
    """
    if store.redactor is not None:
        rater_id = store.redactor.identifier(rater_id)
    with store.reading() as c:
        if rng.random() < config.feedback.repeat_share:
            item = _repeat(c, config, rater_id, rng)
            if item is not None:
                return item
        return None if repeats_only else _new(c, config, rater_id, rng)


def _new(c: Connection, config: Config, rater_id: str, rng: random.Random) -> Item | None:
    pool = pool_of(rater_id, config.serve.gate_share)
    sent = marks.queued(c, config.policy.name, pool, rater_id, CANDIDATES)
    ids = queue.unpicked(c, config.policy.name, pool, CANDIDATES)
    for group in _usable(c, rng.sample(sent, len(sent)) + rng.sample(ids, len(ids))):
        return Item(group, (0, 1) if rng.random() < 0.5 else (1, 0), is_repeat=False)
    return None


def _repeat(c: Connection, config: Config, rater_id: str, rng: random.Random) -> Item | None:
    after = config.feedback.repeat_after
    found = queue.repeatable(c, config.policy.name, rater_id, after=after, limit=CANDIDATES)
    shown = {one.group_id: one.shown_order for one in found}
    for group in _usable(c, rng.sample(list(shown), len(shown))):
        return Item(group, (0, 1) if shown[group.group_id] == (1, 0) else (1, 0), is_repeat=True)
    return None


def _usable(c: Connection, group_ids: list[str]) -> list[Group]:
    """The first of them that shows two different whole answers."""
    for group_id in group_ids:
        group = groups.get(c, group_id)
        if group is None or group.is_erased or group.is_abandoned or len(group.completions) != 2:
            continue
        if group.completions[0].text != group.completions[1].text:
            return [group]
    return []
