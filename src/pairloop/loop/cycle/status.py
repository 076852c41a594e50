"""Where the loop stands, for ``pairloop cycle status`` and the web page: read from the store alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cronsim import CronSim
from sqlalchemy import Connection

from pairloop.config import Config, ScheduleSection, duration_s
from pairloop.loop import gate, pairs
from pairloop.store import Store, cycles, datasets, duels, runs, triggers, verdicts, versions
from pairloop.types import BASE_VERSION, Alias, Cycle, CycleState, Duel, Interval, Verdict

IDLE = "idle"


@dataclass(frozen=True, slots=True)
class DuelStatus:
    """The duel so far. ``picks`` are all that people made, ``wins``, ``losses`` and ``ties`` the votes that count."""

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


@dataclass(frozen=True, slots=True)
class CycleStatus:
    """The open cycle's state (``idle`` without one), what the next one waits for, and the last verdict.

    ``staleness``: promotions since the newest snapshot, i.e. by how many versions the oldest unused pick may be behind.
    ``progress``: the training run's own row (step, of, loss, …) while it trains. ``min_pairs``: None where picks start nothing.
    """

    policy: str
    state: str
    text: str
    champion: int
    cycle_id: str | None
    number: int | None
    trigger: str | None
    challenger: int | None
    progress: Mapping[str, Any] | None
    duel: DuelStatus | None
    new_pairs: int
    min_pairs: int | None
    pending: str | None
    next_run_at: datetime | None
    staleness: int
    last_cycle: int | None
    last_state: str | None
    last_reason: str | None
    last_verdict: Verdict | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; intervals by name."""
        data = asdict(self)
        data["next_run_at"] = None if self.next_run_at is None else self.next_run_at.isoformat()
        if self.duel is not None:
            data["duel"]["win_rate"] = self.duel.win_rate._asdict()
        return data


def status(store: Store, config: Config, *, now: datetime | None = None) -> CycleStatus:
    """Where the configured policy's loop stands."""
    name = config.policy.name
    new_pairs = pairs.count_new(store, config)
    with store.reading() as c:
        recent = cycles.list_(c, name, limit=2)
        current = recent[0] if recent and not recent[0].state.is_terminal else None
        ended = next((cycle for cycle in recent if cycle.state.is_terminal), None)
        history = verdicts.for_cycle(c, ended.cycle_id) if ended is not None else []
        run = runs.for_cycle(c, current.cycle_id) if current is not None else None
        duel = _duel_status(c, config, duels.current(c, name))
        champion = versions.alias(c, name, Alias.CHAMPION)
        challenger = (current.record(CycleState.CHECKING) or {}).get("version") if current is not None else None
        pending = triggers.peek(c, name)
        staleness = _staleness(c, name)
        base = versions.get(c, name, BASE_VERSION)
    began = recent[0].created_at if recent else base.created_at if base is not None else None
    progress = dict(run.progress) if run is not None and current is not None and current.state is CycleState.TRAINING else None
    return CycleStatus(
        policy=name,
        state=IDLE if current is None else str(current.state),
        text=_text(current, duel, progress, new_pairs, config.schedule),
        champion=BASE_VERSION if champion is None else champion,
        cycle_id=None if current is None else current.cycle_id,
        number=None if current is None else current.number,
        trigger=None if current is None else current.trigger,
        challenger=challenger,
        progress=progress,
        duel=duel,
        new_pairs=new_pairs,
        min_pairs=config.schedule.min_pairs or None,
        pending=pending,
        next_run_at=None if began is None else next_run_at(config.schedule, began, now or datetime.now(UTC)),
        staleness=staleness,
        last_cycle=None if ended is None else ended.number,
        last_state=None if ended is None else str(ended.state),
        last_reason=None if ended is None else ended.steps[-1].record.get("reason"),
        last_verdict=history[-1][1] if history else None,
    )


def next_run_at(section: ScheduleSection, last_started_at: datetime, now: datetime) -> datetime | None:
    """When the clock (``every`` or ``cron``, in UTC) next starts a cycle; ``now`` where that time is past; None without one."""
    if not section.enabled:
        return None
    times = []
    if section.every is not None:
        times.append(last_started_at + timedelta(seconds=duration_s(section.every)))
    if section.cron is not None:
        times.append(next(CronSim(section.cron, last_started_at.astimezone(UTC))))
    return max(min(times), now) if times else None


def _duel_status(c: Connection, config: Config, duel: Duel | None) -> DuelStatus | None:
    if duel is None:
        return None
    votes = gate.votes(duel, duels.picks(c, duel.duel_id), min_latency_ms=config.feedback.min_latency_ms)
    counts = gate.tally(votes, config.gate)
    picks = duels.count_picks(c, duel.duel_id)
    to_go = gate.picks_to_go(counts, config.gate)
    return DuelStatus(
        duel_id=duel.duel_id,
        champion=duel.champion,
        challenger=duel.challenger,
        picks=picks,
        wins=counts.wins,
        losses=counts.losses,
        ties=counts.ties,
        raters=counts.raters,
        win_rate=gate.win_rate(counts.wins, counts.decisive),
        e_value=gate.e_value(*gate.evidence(counts, config.gate)),
        e_needed=1 / config.gate.alpha,
        to_go=to_go,
        text=f"duelling, {picks} picks, about {to_go} to go",
    )


def _staleness(c: Connection, name: str) -> int:
    snapshots = datasets.list_(c, name)
    since = snapshots[0].created_at if snapshots else None
    return sum(
        event.action == "promote" and (since is None or event.created_at > since) for event in versions.promotions(c, name)
    )


def _text(
    cycle: Cycle | None, duel: DuelStatus | None, progress: Mapping[str, Any] | None, new_pairs: int, section: ScheduleSection
) -> str:
    """One line for people."""
    if cycle is None:
        wanted = f" of {section.min_pairs}" if section.min_pairs else ""
        return f"idle, {new_pairs} new pairs{wanted}"
    if duel is not None and cycle.state is CycleState.DUELLING:
        return duel.text
    if progress and progress.get("of"):
        return f"training, step {progress.get('step', 0)} of {progress['of']}"
    return str(cycle.state)
