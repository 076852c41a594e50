"""Where the loop stands, for ``pairloop cycle status``, ``GET /v1/status`` and the web page: read from the store alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, NamedTuple

from cronsim import CronSim
from sqlalchemy import Connection

from pairloop.config import Config, ScheduleSection, duration_s
from pairloop.loop import deploy, gate, pairs
from pairloop.loop.cycle.judging import AgainstBase, against_base, votes_so_far
from pairloop.loop.cycle.rounds import RoundStatus, round_of
from pairloop.statistics import percent
from pairloop.store import Store, canaries, cycles, datasets, duels, runs, schedules, triggers, verdicts, versions
from pairloop.store.canaries import Canary
from pairloop.types import BASE_VERSION, Alias, Cycle, CycleState, Duel, Interval, Run, Verdict

IDLE = "idle"
RECENT = 8
"""Cycles among which the last round is looked for: those without enough pairs train nothing."""


class Progress(NamedTuple):
    """How far the running stage is: steps of the training, or picks of the duel (``of`` is then an estimate)."""

    done: int
    of: int


@dataclass(frozen=True, slots=True)
class DuelStatus:
    """The duel so far. ``picks`` are all that people made, ``wins``, ``losses`` and ``ties`` the votes that count.

    ``win_rate``: the challenger's, ties half. ``seed_picks``: those of the seed duel beside it.
    """

    duel_id: str
    champion: int
    challenger: int
    picks: int
    wins: int
    losses: int
    ties: int
    raters: int
    win_rate: Interval
    e_value: float
    e_needed: float
    to_go: int
    text: str
    seed_picks: int
    against_base: AgainstBase | None


@dataclass(frozen=True, slots=True)
class CanaryStatus:
    """The version that answers a share of the users, and how long it must yet; ``broken``: the live guards that broke."""

    version: int
    share: float
    answers: int
    answers_needed: int
    until: datetime
    broken: str | None
    text: str

    @classmethod
    def of(cls, c: Connection, config: Config, canary: Canary, now: datetime) -> CanaryStatus:
        found, needed = deploy.canary_standing(c, config, canary, now), config.deploy.canary_requests
        until = canary.opened_at + timedelta(hours=config.deploy.canary_hours)
        text = f"version {canary.version} is the canary of {percent(canary.share)} of the users, "
        text += f"{found.answers} of {needed} requests answered, until {until:%H:%M} (UTC) at least"
        return cls(canary.version, canary.share, found.answers, needed, until, found.broken, text)


@dataclass(frozen=True, slots=True)
class LastVerdict:
    """What the gate last said: about which cycle, which version, and when."""

    cycle: int
    version: int | None
    verdict: Verdict
    given_at: datetime


@dataclass(frozen=True, slots=True)
class CycleStatus:
    """The open cycle (``idle`` without one), what the next one waits for, and how the last one ended.

    ``challenger``: the version that the open cycle puts to the test. ``since``: when that cycle entered its state. ``run``: its
    training run. ``progress``: None where it is not known. ``enabled``: whether cycles begin by themselves.
    ``min_pairs``: None where picks start nothing. ``staleness``:
    promotions since the newest snapshot, i.e. by how many versions the oldest unused pick may be behind. ``last_verdict``: of
    the newest cycle that the gate has spoken about, which may be the open one. ``last_round``: of the newest cycle that has
    trained a version, which may be the open one too.
    """

    policy: str
    state: str
    text: str
    champion: int
    challenger: int | None
    cycle_id: str | None
    number: int | None
    trigger: str | None
    since: datetime | None
    progress: Progress | None
    run: Run | None
    duel: DuelStatus | None
    canary: CanaryStatus | None
    new_pairs: int
    enabled: bool
    min_pairs: int | None
    pending: str | None
    next_run_at: datetime | None
    staleness: int
    last_cycle: int | None
    last_state: str | None
    last_reason: str | None
    last_verdict: LastVerdict | None
    last_round: RoundStatus | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data: times in ISO form, intervals and progress by name, of the run what it says of itself."""
        data = asdict(self)
        for name in ("since", "next_run_at"):
            data[name] = None if data[name] is None else data[name].isoformat()
        data["progress"] = None if self.progress is None else self.progress._asdict()
        data["run"] = None if self.run is None else run_json(self.run)
        if self.canary is not None:
            data["canary"]["until"] = self.canary.until.isoformat()
        if self.duel is not None:
            data["duel"]["win_rate"] = self.duel.win_rate._asdict()
            met = self.duel.against_base
            data["duel"]["against_base"] = None if met is None else met.as_json()
        if self.last_verdict is not None:
            data["last_verdict"]["given_at"] = self.last_verdict.given_at.isoformat()
        data["last_round"] = None if self.last_round is None else self.last_round.as_json()
        return data


def run_json(run: Run) -> dict[str, Any]:
    """A training run with its newest figures (step, of, loss, …) as plain JSON data."""
    return {"id": run.run_id, "status": str(run.status), **run.progress}


def status(
    store: Store,
    config: Config,
    *,
    now: datetime | None = None,
    earlier: CycleStatus | None = None,
    new_pairs: int | None = None,
) -> CycleStatus:
    """Where the configured policy's loop stands.

    ``earlier``: what this said before. Its count of the duel's votes is taken over where no pick has come since.
    ``new_pairs``: as `pairs.counted_new` has them; else they are counted.
    """
    name = config.policy.name
    new_pairs = pairs.count_new(store, config) if new_pairs is None else new_pairs
    with store.reading() as c:
        recent = cycles.list_(c, name, limit=RECENT)
        current = recent[0] if recent and not recent[0].state.is_terminal else None
        ended = next((cycle for cycle in recent if cycle.state.is_terminal), None)
        run = runs.for_cycle(c, current.cycle_id) if current is not None else None
        open_duel = duels.current(c, name)
        duel = _duel_status(c, config, open_duel, earlier)
        canary = canaries.current(c, name)
        trial = None if canary is None else CanaryStatus.of(c, config, canary, now or datetime.now(UTC))
        last_verdict = _last_verdict(c, name)
        champion = versions.alias(c, name, Alias.CHAMPION)
        pending = triggers.peek(c, name)
        staleness = _staleness(c, name)
        base = versions.get(c, name, BASE_VERSION)
        section = schedules.current(c, config).section
    began = recent[0].created_at if recent else base.created_at if base is not None else None
    progress = _progress(current, run, duel)
    return CycleStatus(
        policy=name,
        state=IDLE if current is None else str(current.state),
        text=_text(current, duel, trial, progress, new_pairs, section),
        champion=BASE_VERSION if champion is None else champion,
        challenger=None if current is None else challenger_of(current, open_duel),
        cycle_id=None if current is None else current.cycle_id,
        number=None if current is None else current.number,
        trigger=None if current is None else current.trigger,
        since=None if current is None else current.steps[-1].created_at,
        progress=progress,
        run=run,
        duel=duel,
        canary=trial,
        new_pairs=new_pairs,
        enabled=section.enabled,
        min_pairs=_counted(section),
        pending=pending,
        next_run_at=None if began is None else next_run_at(section, began, now or datetime.now(UTC)),
        staleness=staleness,
        last_cycle=None if ended is None else ended.number,
        last_state=None if ended is None else str(ended.state),
        last_reason=None if ended is None else ended.steps[-1].record.get("reason"),
        last_verdict=last_verdict,
        last_round=next((found for cycle in recent if (found := round_of(cycle)) is not None), None),
    )


def challenger_of(cycle: Cycle, duel: Duel | None) -> int | None:
    """The version that a cycle puts to the test, as its duel says; without one, as the record of its training says."""
    if duel is not None and duel.cycle_id == cycle.cycle_id:
        return duel.challenger
    number = (cycle.record(CycleState.CHECKING) or {}).get("version")
    return number if isinstance(number, int) else None


def next_run_at(section: ScheduleSection, last_started_at: datetime, now: datetime) -> datetime | None:
    """When the clock (``every`` or ``cron``, in UTC) next starts a cycle; ``now`` where that time is past; None without one."""
    if not section.enabled:
        return None
    times = []
    if section.every is not None:
        times.append(last_started_at + timedelta(seconds=duration_s(section.every)))
    if section.cron is not None:
        times += islice(CronSim(section.cron, last_started_at.astimezone(UTC)), 1)  # none where it is too far off
    return max(min(times), now) if times else None


def runs_ahead(section: ScheduleSection, last_started_at: datetime, now: datetime, n: int) -> list[datetime]:
    """The next ``n`` times at which the clock starts a cycle, if each begins on time; none without a clock."""
    times: list[datetime] = []
    while len(times) < n and (at := next_run_at(section, last_started_at, now)) is not None:
        times.append(at)
        last_started_at = now = at
    return times


def _duel_status(c: Connection, config: Config, duel: Duel | None, earlier: CycleStatus | None) -> DuelStatus | None:
    if duel is None:
        return None
    picks, seed = duels.count_picks(c, duel.duel_id), duels.seed_of(c, duel)
    seed_picks = 0 if seed is None else duels.count_picks(c, seed.duel_id)
    known = None if earlier is None else earlier.duel
    if known is not None and (known.duel_id, known.picks, known.seed_picks) == (duel.duel_id, picks, seed_picks):
        return known
    limits = gate.spent(config.gate, duels.number(c, duel))
    votes = votes_so_far(c, config, duel)
    counted = gate.count(votes, limits)
    counts = counted.tally
    to_go = gate.picks_to_go(counts, limits)
    return DuelStatus(
        duel_id=duel.duel_id,
        champion=duel.champion,
        challenger=duel.challenger,
        picks=picks,
        wins=counts.wins,
        losses=counts.losses,
        ties=counts.ties,
        raters=counts.raters,
        win_rate=gate.win_rate(counts.wins + counts.ties / 2, counts.votes),
        e_value=gate.e_value_of(counted),
        e_needed=1 / limits.alpha,
        to_go=to_go,
        text=f"duelling, {picks} picks, about {to_go} to go",
        seed_picks=seed_picks,
        against_base=against_base(c, config, duel, votes),
    )


def _last_verdict(c: Connection, name: str) -> LastVerdict | None:
    given = verdicts.latest(c, name)
    cycle = cycles.get(c, given.cycle_id) if given is not None else None
    if given is None or cycle is None:
        return None
    duel = duels.get(c, given.duel_id) if given.duel_id is not None else None
    return LastVerdict(cycle.number, challenger_of(cycle, duel), given.verdict, given.created_at)


def _staleness(c: Connection, name: str) -> int:
    snapshots = datasets.list_(c, name)
    since = snapshots[0].created_at if snapshots else None
    return sum(
        event.action == "promote" and (since is None or event.created_at > since) for event in versions.promotions(c, name)
    )


def _progress(cycle: Cycle | None, run: Run | None, duel: DuelStatus | None) -> Progress | None:
    if duel is not None:
        return Progress(duel.picks, duel.picks + duel.to_go)
    if cycle is None or run is None or cycle.state is not CycleState.TRAINING:
        return None
    step, steps = run.progress.get("step"), run.progress.get("of")
    return Progress(step, steps) if isinstance(step, int) and isinstance(steps, int) and steps > 0 else None


def _counted(section: ScheduleSection) -> int | None:
    """New pairs that start a cycle; None where they start none."""
    return section.min_pairs or None if section.enabled else None


def _text(
    cycle: Cycle | None,
    duel: DuelStatus | None,
    canary: CanaryStatus | None,
    progress: Progress | None,
    new_pairs: int,
    section: ScheduleSection,
) -> str:
    """One line for people."""
    if canary is not None and (cycle is None or cycle.state is CycleState.CANARY):
        return canary.text
    if cycle is None:
        wanted = f" of {section.min_pairs}" if _counted(section) else ""
        paused = "" if section.enabled else "; the schedule is paused"
        return f"idle, {new_pairs} new pairs{wanted}{paused}"
    if duel is not None and cycle.state is CycleState.DUELLING:
        return duel.text
    if progress is not None and cycle.state is CycleState.TRAINING:
        return f"training, step {progress.done} of {progress.of}"
    return str(cycle.state)
