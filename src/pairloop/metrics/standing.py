"""Where the loop stands, from the store: champion, cycle, round, gate and duel; and what the scheduler of this process says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, get_args

from prometheus_client.core import Metric
from sqlalchemy import Connection

from pairloop.config import Config, ScheduleSection
from pairloop.loop.cycle import RoundStatus, last_look, round_of
from pairloop.metrics.families import Live, age_s, gauge, gauges, totals
from pairloop.store import Store, canaries, counts, cycles, duels, schedules, verdicts, versions
from pairloop.store.versions import PromotionAction
from pairloop.types import BASE_VERSION, Alias, Cycle, CycleState, RunStatus, VerdictKind

RECENT = 8
"""Cycles among which the last round is looked for."""
ENDS = tuple(state for state in CycleState if state.is_terminal)
SchedulerStatus = Callable[[], Mapping[str, Any]]


class Standing(Live):
    """Gauges and totals of one policy."""

    def __init__(self, store: Store, config: Config, scheduler: SchedulerStatus) -> None:
        self._store = store
        self._config = config
        self._policy = config.policy.name
        self._scheduler = scheduler

    def read(self) -> Iterable[Metric]:
        now = datetime.now(UTC)
        with self._store.reading() as c:
            recent = cycles.list_(c, self._policy, RECENT)
            yield from self._versions(c)
            yield from _schedule(schedules.current(c, self._config).section)
            yield from _cycle(recent, now)
            yield from _round(next((found for cycle in recent if (found := round_of(cycle)) is not None), None))
            yield from self._gate(c)
            ends = _from_zero(ENDS, counts.cycles_by_end(c, self._policy))
            yield totals("cycles", "Cycles that ended, by state", "state", ends)
            runs = _from_zero(RunStatus, counts.runs_by_status(c, self._policy))
            yield totals("runs", "Training runs of cycles, by status", "status", runs)
        yield from self._scheduling(now)

    def _versions(self, c: Connection) -> Iterable[Metric]:
        champion = versions.alias(c, self._policy, Alias.CHAMPION)
        moves = _from_zero(get_args(PromotionAction), counts.promotions_by_action(c, self._policy))
        canary = canaries.current(c, self._policy)
        yield gauge("champion_version", "Number of the champion", champion or BASE_VERSION)
        share = 0.0 if canary is None else canary.share
        yield gauge("canary_share", "Share of users whom a canary answers; 0 without one", share)
        yield totals("promotions", "Moves of the champion, and challengers retired, by action", "action", moves)

    def _gate(self, c: Connection) -> Iterable[Metric]:
        given = verdicts.latest(c, self._policy)
        rules = (
            {} if given is None else {one.rule: float(one.passed) for one in given.verdict.reasons if one.passed is not None}
        )
        duel = duels.current(c, self._policy)
        look = last_look(self._policy)
        is_of_it = look is not None and duel is not None and look.duel_id == duel.duel_id
        e_value = look.verdict.e_value if look is not None and is_of_it else None
        picks = None if duel is None else duels.count_picks(c, duel.duel_id)
        opened_s = None if duel is None else age_s(duel.opened_at, datetime.now(UTC))
        kinds = _from_zero(VerdictKind, counts.verdicts_by_kind(c, self._policy))
        yield totals("gate_verdicts", "Verdicts of the gate, by kind", "kind", kinds)
        yield gauges("gate_rule_passed", "1 where the last verdict's rule passed, 0 where it did not", "rule", rules)
        yield gauge("duel_picks", "Picks in the open duel", picks)
        yield gauge("duel_seconds", "How long the open duel has been open", opened_s)
        yield gauge("duel_e_value", "E-value of the open duel, at this process's last look", e_value)

    def _scheduling(self, now: datetime) -> Iterable[Metric]:
        status = self._scheduler()
        running = float(bool(status.get("running")))
        trouble = float(status.get("error") is not None)
        yield gauge("scheduler_running", "1 where this process turns the loop", running)
        yield gauge("scheduler_trouble", "1 while the last thing that the scheduler did went wrong", trouble)
        looked_at = status.get("looked_at")
        look_s = None if looked_at is None else age_s(datetime.fromisoformat(looked_at), now)
        yield gauge("scheduler_look_age_seconds", "Since the scheduler last finished a look", look_s)
        yield gauge("new_pairs", "New usable pairs, when the scheduler last counted them", status.get("new_pairs"))


def _from_zero(known: Iterable[str], counted: Mapping[str, int]) -> dict[str, int]:
    """With those that never happened: a series that begins at 1 has no increase, and the first of them would raise no alarm."""
    return dict.fromkeys(map(str, known), 0) | dict(counted)


def _schedule(section: ScheduleSection) -> Iterable[Metric]:
    yield gauge(
        "schedule_enabled", "1 where cycles begin by themselves, 0 where the schedule is paused", float(section.enabled)
    )
    yield gauge("schedule_min_pairs", "New usable pairs that start a cycle; 0 where they start none", section.min_pairs)


def _cycle(recent: Sequence[Cycle], now: datetime) -> Iterable[Metric]:
    current = recent[0] if recent and not recent[0].state.is_terminal else None
    states = {
        state.value: float(current is not None and current.state is state) for state in CycleState if not state.is_terminal
    }
    yield gauges("cycle_state", "1 for the state of the running cycle", "state", states)
    since = None if current is None else age_s(current.steps[-1].created_at, now)
    yield gauge("cycle_state_seconds", "How long the running cycle has been in its state", since)
    yield gauges("cycle_step_seconds", "How long the state took the last time that a cycle left it", "state", _took(recent))
    ended = next((cycle for cycle in recent if cycle.state.is_terminal), None)
    last = {} if ended is None else {ended.state.value: 1.0}
    yield gauges("last_cycle", "1 for the state in which the last cycle ended", "state", last)
    ended_s = None if ended is None else age_s(ended.steps[-1].created_at, now)
    yield gauge("last_cycle_age_seconds", "Since the last cycle ended", ended_s)


def _took(recent: Sequence[Cycle]) -> dict[str, float]:
    took: dict[str, float] = {}
    for cycle in recent:  # newest first
        for step, after in zip(cycle.steps, cycle.steps[1:], strict=False):
            took.setdefault(step.state.value, (after.created_at - step.created_at).total_seconds())
    return took


def _round(found: RoundStatus | None) -> Iterable[Metric]:
    """The last training round: how far it moved, how stale its data grew, why it stopped."""
    kl, ess, stopped = {}, {}, {}
    if found is not None:
        kl = {name: value.mean for name, value in (("parent", found.kl_parent), ("base", found.kl_base)) if value is not None}
        ess = {name: value for name, value in (("mean", found.ess_mean), ("min", found.ess_min)) if value is not None}
        stopped = {found.stopped_because: 1.0}
    yield gauges("round_kl", "KL of the last round's version to its parent and to the base, nats per answer", "to", kl)
    yield gauges("round_ess", "Effective sample size of the last round, 0 to 1", "of", ess)
    yield gauges("round_stopped", "1 for why the last round stopped", "reason", stopped)
    yield gauge("round_steps", "Steps of the last round", None if found is None else found.steps)
    yield gauge(
        "round_steps_planned", "Steps that the last round would have taken", None if found is None else found.steps_planned
    )
