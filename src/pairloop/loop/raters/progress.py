"""How the labelling goes: what is left, what was done today and by whom, and how far people agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time

from pairloop.config import Config
from pairloop.loop.raters.desk import stored_id
from pairloop.loop.raters.profile import Agreement, agreement
from pairloop.loop.serve import pool_of
from pairloop.store import Store, queue
from pairloop.store.clock import shared_now
from pairloop.store.queue import NEWEST, Left
from pairloop.types import Pool

RECENT = 5_000
"""Newest answers that today's count and the agreement are taken from."""


@dataclass(frozen=True, slots=True)
class Progress:
    """``left`` by pool, ``pool`` is the rater's own; ``today``: answers by rater, most first; ``mine``: all of this rater.

    ``newest``: of so many groups per pool at most; ``is_cut``: whether today had more answers than were read.
    """

    rater_id: str
    pool: Pool
    left: Mapping[Pool, Left]
    today: Sequence[tuple[str, int]]
    mine: int
    mine_today: int
    agreement: Agreement | None
    is_cut: bool
    newest: int = NEWEST


def progress(store: Store, config: Config, rater_id: str) -> Progress:
    """Everything for one rater; days are UTC."""
    rater_id, policy = stored_id(store, rater_id), config.policy.name
    with store.reading() as c:
        now = shared_now(c)
        left = {pool: queue.left(c, policy, pool, reviewers=config.queue.reviewers, now=now) for pool in Pool}
        midnight = datetime.combine(now.astimezone(UTC).date(), time(), UTC)
        done, rows = queue.done_since(c, policy, midnight, newest=RECENT)
        mine = queue.done_by(c, policy, rater_id)
        votes = queue.votes(c, policy, RECENT)
    today = sorted(done.items(), key=lambda one: (-one[1], one[0]))
    pool = pool_of(rater_id, config.serve.gate_share)
    is_cut = rows == RECENT and sum(done.values()) == RECENT
    return Progress(rater_id, pool, left, today, mine, done.get(rater_id, 0), agreement(votes), is_cut)
