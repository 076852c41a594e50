"""The operator's desk: who picked what, quarantine and release with a reason, and what either would change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import ConflictError, NotFoundError
from pairloop.loop import gate, pairs
from pairloop.loop.pairs import Dropped
from pairloop.loop.raters.checks import Checked, Observed, check
from pairloop.loop.raters.flips import FlipRate, flip_rate
from pairloop.store import Store, audit, duels, picked, quarantines, versions
from pairloop.store.audit import AuditAction
from pairloop.store.picked import Picked
from pairloop.store.quarantines import Action, Quarantine
from pairloop.store.reader import Readable
from pairloop.store.schema import feedback as feedback_table
from pairloop.store.subjects import RATER
from pairloop.types import BASE_VERSION, PREFERENCE_METRIC, REPEAT_METRIC, Alias, Duel, Source

NEWEST = 20_000
"""Picks that one look reads, the newest."""


@dataclass(frozen=True, slots=True)
class Raters:
    """All raters of the newest picks, the quarantines that hold, and the measured flip rate."""

    checked: list[Checked]
    quarantined: dict[str, Quarantine]
    flip_rate: FlipRate | None


@dataclass(frozen=True, slots=True)
class DuelEffect:
    """The open duel's votes and evidence."""

    wins: int
    losses: int
    e_value: float


@dataclass(frozen=True, slots=True)
class Effect:
    """What a quarantine or release changes: ``pairs`` of the next snapshot rest on this rater, or would again."""

    rater_id: str
    action: Action
    picks: int
    pairs: int
    duel_before: DuelEffect | None
    duel_after: DuelEffect | None


def look(store: Store, config: Config) -> Raters:
    """Every rater with what is odd about them. Reads the newest `NEWEST` picks."""
    with store.reading() as c:
        picks, repeats = _observed(c, config)
        quarantined = quarantines.current(c, config.policy.name)
    return Raters(check(picks), quarantined, flip_rate(_of_others(picks + repeats, quarantined)))


def measured_flips(store: Store, config: Config) -> FlipRate | None:
    """How often the newest picks of raters who are not quarantined are flipped; None where nobody was asked anything twice."""
    with store.reading() as c:
        picks, repeats = _observed(c, config)
        quarantined = quarantines.current(c, config.policy.name)
    return flip_rate(_of_others(picks + repeats, quarantined))


def _of_others(picks: Sequence[Observed], quarantined: Collection[str]) -> list[Observed]:
    return [pick for pick in picks if pick.rater_id not in quarantined]


def preview(store: Store, config: Config, rater_id: str, action: Action) -> Effect:
    """What the action would change now; NotFoundError for a rater without feedback, ConflictError where it holds already."""
    policy = config.policy.name
    with store.reading() as c:
        rater_id = known_id(c, store, policy, rater_id)
        own = _feedback_ids(c, policy, rater_id)
        held = set(quarantines.current(c, policy))
        duel = duels.current(c, policy)
        champion = versions.alias(c, policy, Alias.CHAMPION) or BASE_VERSION
        if not own:
            raise NotFoundError(f"no feedback of rater {rater_id!r}; `pairloop raters list` names those who gave some")
        if (rater_id in held) == (action is Action.QUARANTINE):
            is_held = "is quarantined already" if rater_id in held else "is not quarantined"
            raise ConflictError(f"rater {rater_id!r} {is_held}")
        after = held | {rater_id} if action is Action.QUARANTINE else held - {rater_id}
        before_duel, after_duel = (_duel(c, config, duel, who) if duel is not None else None for who in (held, after))
    touch = partial(_touched, config=config, parent=champion, own=own, action=action)
    touched = pairs.near_or_apart(store, config, touch, parent=champion)
    assert touched is not None, "nobody stops it"
    return Effect(rater_id, action, len(own), touched, before_duel, after_duel)


def _touched(store: Readable, *, config: Config, parent: int, own: Collection[str], action: Action) -> int:
    """How many pairs of the next snapshot rest on feedback among ``own``, or would again."""
    compiled = pairs.compile_new(store, None, config, parent=parent).compiled
    if action is Action.QUARANTINE:
        return sum(any(one in own for one in pair.feedback_ids) for pair in compiled.pairs)
    return sum(reason == Dropped.QUARANTINED and row in own for row, reason in compiled.set_aside.items())


def decide(store: Store, config: Config, rater_id: str, action: Action, reason: str, *, actor: str) -> Effect:
    """Quarantine or release, kept with its reason; votes stay as they are, and the effect is what ``preview`` says."""
    effect = preview(store, config, rater_id, action)
    reason = store.kept_words(reason)
    decision = Quarantine(effect.rater_id, action, reason, datetime.now(UTC))
    details = {"picks": effect.picks, "pairs": effect.pairs}

    def commit(c: Connection) -> None:
        quarantines.insert(c, config.policy.name, decision)
        done = AuditAction(action.value)
        audit.record(c, done, actor=actor, subject=f"{RATER}{effect.rater_id}", reason=reason, details=details)

    store.write(commit)
    return effect


def stored_id(store: Store, rater_id: str) -> str:
    """Under what a rater is stored: a pseudonym, where the id is an address."""
    return rater_id if store.redactor is None else store.redactor.identifier(rater_id)


def known_id(c: Connection, store: Store, policy: str, rater_id: str) -> str:
    """Under what there is feedback of a rater: as `stored_id` or, from before redaction was turned on, as it is."""
    stored = stored_id(store, rater_id)
    return stored if stored == rater_id or _feedback_ids(c, policy, stored) else rater_id


def _duel(c: Connection, config: Config, duel: Duel, quarantined: Collection[str]) -> DuelEffect:
    limits = gate.spent(config.gate, duels.number(c, duel))
    picks = duels.picks(c, duel.duel_id)
    votes = gate.votes(duel, picks, min_latency_ms=config.feedback.min_latency_ms, quarantined=quarantined)
    counted = gate.count(votes, limits)
    return DuelEffect(counted.tally.wins, counted.tally.losses, gate.e_value_of(counted))


def _feedback_ids(c: Connection, policy: str, rater_id: str) -> set[str]:
    statement = sa.select(feedback_table.c.feedback_id).where(
        feedback_table.c.policy == policy,
        feedback_table.c.rater_id == rater_id,
        feedback_table.c.source == Source.HUMAN.value,
    )
    return set(c.execute(statement).scalars())


def _observed(c: Connection, config: Config) -> tuple[list[Observed], list[Observed]]:
    """What people first said, oldest first, and what they said when they were asked the same again."""
    challengers = challengers_of(c, config.policy.name)
    seen: dict[str, list[Observed]] = {PREFERENCE_METRIC: [], REPEAT_METRIC: []}
    for row in reversed(picked.newest(c, config.policy.name, NEWEST)):
        if row.metric in seen:
            seen[row.metric].append(observed(row, challengers, config.feedback.min_latency_ms))
    return seen[PREFERENCE_METRIC], seen[REPEAT_METRIC]


def challengers_of(c: Connection, policy: str) -> dict[str, int]:
    """The challenger of each duel with a champion: against the base most people prefer most challengers."""
    return {duel.duel_id: duel.challenger for duel in duels.list_(c, policy, NEWEST)}


def observed(row: Picked, challengers: Mapping[str, int], min_latency_ms: int) -> Observed:
    """What the tests look at of one row."""
    chosen, first = row.chosen, row.first_index
    challenger = challengers.get(row.duel_id or "")
    is_told = chosen is not None and row.keys[0] != row.keys[1]
    return Observed(
        rater_id=row.rater_id,
        place=chosen == first if is_told else None,
        longer=row.lengths[chosen] == max(row.lengths) if chosen is not None and row.lengths[0] != row.lengths[1] else None,
        challenger=row.versions[chosen] == challenger if chosen is not None and is_told and challenger else None,
        is_instant=row.latency_ms is not None and row.latency_ms < min_latency_ms,
        question=row.question,
        chosen=row.keys[chosen] if chosen is not None else None,
        first=row.keys[first],
    )
