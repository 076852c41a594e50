"""A verdict with everything that it rests on, for whoever reads it: votes, the path of the evidence, slices, comparisons."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import Connection

from pairloop.config import Config, GateSection
from pairloop.loop import deploy, evaluate, gate
from pairloop.loop.cycle.judging import AgainstBase, against_base, kept_against_base, standing, votes_of
from pairloop.store import duels, quarantines, verdicts
from pairloop.types import PREFERENCE_METRIC, Cycle, CycleState, Duel, DuelPick, Interval, Reason, Verdict, VerdictKind


@dataclass(frozen=True, slots=True)
class Look:
    """One rule with the interval of what it looked at."""

    reason: Reason
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison of the duel that somebody picked from; ``vote`` is what that counts as, None where it was set aside."""

    group_id: str
    vote: DuelPick | None


class _Counted(NamedTuple):
    """A duel's comparisons, the newest first, its votes, and the path of the evidence."""

    compared: tuple[Compared, ...]
    votes: tuple[DuelPick, ...]
    path: tuple[gate.Step, ...]


_KEPT = 8
_counted: OrderedDict[Hashable, _Counted] = OrderedDict()
"""What this process last counted: all picks of a duel are read for it, and whoever pages through them asks again."""
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Review:
    """``verdict``: the gate's last word on a cycle, of an open duel what it says now (``given_at`` is then None).

    ``path``: the evidence after each vote that counts, the first ``judged`` of them before the verdict. ``votes``: those that
    the verdict rests on. ``is_as_judged``: whether the votes still are what they were, for raters may have been quarantined
    since. ``config``: the gate's, with the alpha of this duel. ``guards``: what the live guards say of the version, by now or,
    of one that they ended, when they did. ``base``: the live duel against the base.
    """

    cycle: Cycle
    duel: Duel | None
    verdict: Verdict | None
    given_at: datetime | None
    config: GateSection
    looks: tuple[Look, ...]
    path: tuple[gate.Step, ...]
    judged: int
    votes: tuple[DuelPick, ...]
    is_as_judged: bool
    slices: tuple[gate.Slice, ...]
    compared: tuple[Compared, ...]
    guards: tuple[Reason, ...]
    guarded_answers: int
    base: AgainstBase | None

    @property
    def is_open(self) -> bool:
        return self.verdict is not None and self.given_at is None


def last_word(
    c: Connection, config: Config, cycle: Cycle, votes: Sequence[DuelPick] | None = None
) -> tuple[datetime | None, Verdict | None]:
    """The last verdict about a cycle and when it was given; of a duel that is open, what the gate says now.

    ``votes``: the open duel's, where the caller has them.
    """
    record, duel = cycle.record(CycleState.DUELLING), duels.of_cycle(c, cycle.policy, cycle.cycle_id)
    if cycle.state is CycleState.DUELLING and record and duel is not None and duel.closed_at is None:
        return None, standing(c, config, duel, record["report"], votes)
    history = verdicts.for_cycle(c, cycle.cycle_id)
    return history[-1] if history else (None, None)


def review(c: Connection, config: Config, cycle: Cycle) -> Review:
    """What the gate said of a cycle's challenger, and why."""
    duel = duels.of_cycle(c, cycle.policy, cycle.cycle_id)
    section = config.gate if duel is None else gate.spent(config.gate, duels.number(c, duel))
    compared, votes, path = _Counted((), (), ()) if duel is None else _count(c, config, duel, section)
    given_at, verdict = last_word(c, config, cycle, votes)
    settled = verdict if verdict is not None and given_at is not None else None
    judged = len(path) if settled is None else min(gate.judged(settled, section), len(path))
    rested_on = votes if settled is None else [vote for vote in votes if judged and vote.created_at <= path[judged - 1].at]
    base = kept_against_base(cycle) or (None if duel is None else against_base(c, config, duel, votes))
    guards, answers = _guards(c, config, cycle, duel)
    return Review(
        cycle=cycle,
        duel=duel,
        verdict=verdict,
        given_at=given_at,
        config=section,
        looks=_looks(cycle, verdict, rested_on, section, base),
        path=path,
        judged=judged,
        votes=tuple(rested_on),
        is_as_judged=duel is None or verdict is None or _is_as_judged(verdict, path[:judged], section),
        slices=tuple(gate.by_slice(rested_on, section)),
        compared=compared,
        guards=guards,
        guarded_answers=answers,
        base=base,
    )


def _count(c: Connection, config: Config, duel: Duel, section: GateSection) -> _Counted:
    """As remembered, unless a pick came, a rater was quarantined or released, or the settings are others."""
    quarantined = quarantines.current(c, duel.policy)
    settings = (section.model_dump_json(), config.feedback.min_latency_ms)
    key = (str(c.engine.url), duel.duel_id, duels.count_picks(c, duel.duel_id), frozenset(quarantined), settings)
    with _lock:
        if key in _counted:
            _counted.move_to_end(key)
            return _counted[key]
    oldest_first = [
        Compared(one.group.group_id, next(iter(votes_of(config, duel, [one], quarantined)), None))
        for one in duels.picks(c, duel.duel_id)
        if any(row.metric == PREFERENCE_METRIC for row in one.feedback)
    ]
    compared = tuple(reversed(oldest_first))
    votes = sorted((one.vote for one in compared if one.vote is not None), key=lambda vote: vote.created_at)
    found = _Counted(compared, tuple(votes), tuple(gate.path(votes, section)))
    with _lock:
        _counted[key] = found
        while len(_counted) > _KEPT:
            _counted.popitem(last=False)
    return found


def _looks(
    cycle: Cycle, verdict: Verdict | None, votes: Sequence[DuelPick], config: GateSection, base: AgainstBase | None
) -> tuple[Look, ...]:
    if verdict is None:
        return ()
    told = next((step.record["report"] for step in cycle.steps if "report" in step.record), None)
    report = None if told is None else evaluate.Report.from_json(told)

    def interval(rule: str) -> Interval | None:
        found = gate.interval_of(rule, report, verdict, votes, config)
        return base.win_rate if found is None and base is not None and rule == "seed_duel" else found

    return tuple(Look(reason, interval(reason.rule)) for reason in verdict.reasons)


def _is_as_judged(verdict: Verdict, path: Sequence[gate.Step], config: GateSection) -> bool:
    if verdict.kind is VerdictKind.CONTINUE:
        return True
    if not path:
        return gate.judged(verdict, config) == 0
    return abs(path[-1].e_value - verdict.e_value) <= 1e-9 * max(1.0, verdict.e_value)


def _guards(c: Connection, config: Config, cycle: Cycle, duel: Duel | None) -> tuple[tuple[Reason, ...], int]:
    for step in reversed(cycle.steps):
        if "guards" in step.record:
            return tuple(Reason(**one) for one in step.record["guards"]), step.record["answers"]
    found = None if duel is None else deploy.standing(c, config, datetime.now(UTC))
    if found is None or duel is None or found.version != duel.challenger:
        return (), 0
    return found.reasons, found.answers
