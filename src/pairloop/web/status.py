"""Where the loop stands, read for everybody who watches: one snapshot of the store at most twice a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from time import monotonic
from typing import Any

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.loop import gate, pairs
from pairloop.store import Store, cycles, duels, feedback, groups, runs, triggers, verdicts, versions
from pairloop.types import BASE_VERSION, Alias, Cycle, CycleState, Duel, Interval, Run, Verdict, VerdictKind
from pairloop.web.curve import Contest, Point, as_json, curve

FRESH_S = 0.5
STAGES = (CycleState.BUILDING, CycleState.TRAINING, CycleState.CHECKING, CycleState.DUELLING)
"""The stages that a cycle goes through, in order; then it ends."""
CYCLES_SHOWN = 200


@dataclass(frozen=True, slots=True)
class LiveDuel:
    """The open duel so far: one vote per rater and day, and about how many more picks decide it."""

    duel: Duel
    wins: int
    losses: int
    ties: int
    raters: int
    picks: int
    to_go: int
    e_value: float
    rate: Interval


@dataclass(frozen=True, slots=True)
class CycleView:
    """A cycle with what became of it."""

    cycle: Cycle
    challenger: int | None
    verdict: Verdict | None
    judged_at: datetime | None


@dataclass(frozen=True, slots=True)
class Status:
    """One snapshot. ``revision`` changes when the curve or the list of cycles does."""

    policy: str
    champion: int
    challenger: int | None
    version_count: int
    group_count: int
    new_pairs: int
    min_pairs: int | None
    pending: str | None
    running: CycleView | None
    run: Run | None
    live_duel: LiveDuel | None
    cycles: tuple[CycleView, ...]
    points: tuple[Point, ...]
    scheduler: Mapping[str, Any]
    revision: str

    @property
    def last_verdict(self) -> CycleView | None:
        """The newest cycle that the gate has spoken about."""
        return next((view for view in self.cycles if view.verdict is not None), None)

    @property
    def progress(self) -> tuple[int, int] | None:
        """(done, of) of the running stage, where it is known."""
        if self.live_duel is not None:
            return self.live_duel.picks, self.live_duel.picks + self.live_duel.to_go
        if self.run is not None and self.running is not None and self.running.cycle.state is CycleState.TRAINING:
            step, steps = self.run.progress.get("step"), self.run.progress.get("of")
            if isinstance(step, int) and isinstance(steps, int) and steps > 0:
                return step, steps
        return None

    def as_json(self) -> dict[str, Any]:
        running, duel, judged = self.running, self.live_duel, self.last_verdict
        return {
            "object": "status",
            "policy": self.policy,
            "champion": f"{self.policy}@{self.champion}",
            "challenger": None if self.challenger is None else f"{self.policy}@{self.challenger}",
            "versions": self.version_count,
            "groups": self.group_count,
            "pairs": {"new": self.new_pairs, "needed": self.min_pairs},
            "pending_trigger": self.pending,
            "cycle": None if running is None else _cycle_json(running.cycle),
            "progress": None if self.progress is None else {"done": self.progress[0], "of": self.progress[1]},
            "run": None if self.run is None else {"id": self.run.run_id, "status": self.run.status, **self.run.progress},
            "duel": None if duel is None else _duel_json(duel),
            "last_verdict": None if judged is None else _verdict_json(judged),
            "curve": as_json(self.points),
            "scheduler": dict(self.scheduler),
            "revision": self.revision,
        }


class StatusBoard:
    """Reads the status and remembers it for a moment; votes are counted again only when a pick came. Any thread."""

    def __init__(self, store: Store, config: Config, scheduler_status: Callable[[], Mapping[str, Any]]) -> None:
        self._store = store
        self._config = config
        self._scheduler_status = scheduler_status
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._status: Status | None = None
        self._tallied: tuple[str, int, gate.Tally] | None = None
        self._counted: tuple[int, int, int] | None = None

    def read(self) -> Status:
        with self._lock:
            if self._status is None or monotonic() - self._read_at > FRESH_S:
                self._status = self._read(self._store, self._config)
                self._read_at = monotonic()
            return self._status

    def _read(self, store: Store, config: Config) -> Status:
        policy = config.policy.name
        with store.reading() as c:
            champion = versions.alias(c, policy, Alias.CHAMPION) or BASE_VERSION
            challenger = versions.alias(c, policy, Alias.CHALLENGER)
            by_cycle = {duel.cycle_id: duel for duel in duels.list_(c, policy, CYCLES_SHOWN)}
            views = tuple(_view(c, cycle, by_cycle.get(cycle.cycle_id)) for cycle in cycles.list_(c, policy, CYCLES_SHOWN))
            running = next((view for view in views[:1] if not view.cycle.state.is_terminal), None)
            duel = duels.current(c, policy)
            live = self._live(c, duel, config) if duel is not None else None
            newest = feedback.max_seq(c, policy)
            return Status(
                policy=policy,
                champion=champion,
                challenger=challenger,
                version_count=len(versions.list_(c, policy)),
                group_count=groups.count(c, policy),
                new_pairs=self._new_pairs(newest, len(views)),
                min_pairs=config.schedule.min_pairs,
                pending=triggers.peek(c, policy),
                running=running,
                run=None if running is None else runs.for_cycle(c, running.cycle.cycle_id),
                live_duel=live,
                cycles=views,
                points=tuple(curve(_contests(views, by_cycle, live))),
                scheduler=self._scheduler_status(),
                revision=_revision(champion, views),
            )

    def _new_pairs(self, newest: int, cycles_seen: int) -> int:
        """Usable pairs that wait for a cycle; counted again only when feedback came or a cycle began."""
        if self._counted is None or self._counted[:2] != (newest, cycles_seen):
            self._counted = (newest, cycles_seen, pairs.count_new(self._store, self._config))
        return self._counted[2]

    def _live(self, c: Connection, duel: Duel, config: Config) -> LiveDuel:
        picks = duels.count_picks(c, duel.duel_id)
        if self._tallied is None or self._tallied[:2] != (duel.duel_id, picks):
            votes = gate.votes(duel, duels.picks(c, duel.duel_id), min_latency_ms=config.feedback.min_latency_ms)
            self._tallied = (duel.duel_id, picks, gate.tally(votes, config.gate))
        counts = self._tallied[2]
        return LiveDuel(
            duel=duel,
            wins=counts.wins,
            losses=counts.losses,
            ties=counts.ties,
            raters=counts.raters,
            picks=picks,
            to_go=gate.picks_to_go(counts, config.gate),
            e_value=gate.e_value(*gate.evidence(counts, config.gate)),
            rate=gate.win_rate(counts.wins + counts.ties / 2, counts.wins + counts.losses + counts.ties),
        )


def _view(c: Connection, cycle: Cycle, duel: Duel | None) -> CycleView:
    spoken = verdicts.for_cycle(c, cycle.cycle_id)
    at, verdict = spoken[-1] if spoken else (None, None)
    return CycleView(cycle, duel.challenger if duel is not None else _challenger(cycle), verdict, at)


def _challenger(cycle: Cycle) -> int | None:
    """The version that a cycle without a live duel put to the test, as the record of its training says."""
    number = (cycle.record(CycleState.CHECKING) or {}).get("version")
    return number if isinstance(number, int) else None


def _contests(views: Sequence[CycleView], by_cycle: Mapping[str, Duel], live: LiveDuel | None) -> list[Contest]:
    """Oldest first: the duels that the gate judged, and the open one as it stands."""
    found = []
    for view in reversed(views):
        duel = by_cycle.get(view.cycle.cycle_id)
        champion = duel.champion if duel is not None else view.cycle.parent
        if live is not None and duel is not None and duel.duel_id == live.duel.duel_id:
            found.append(Contest(duel.challenger, duel.champion, live.wins, live.losses, live.ties, None))
        elif view.challenger is not None and view.verdict is not None and view.verdict.kind is not VerdictKind.CONTINUE:
            counts = view.verdict
            found.append(Contest(view.challenger, champion, counts.wins, counts.losses, counts.ties, counts.kind.value))
    return found


def _revision(champion: int, views: Sequence[CycleView]) -> str:
    newest = views[0].cycle if views else None
    return f"{champion}.{newest.number}.{len(newest.steps)}" if newest is not None else f"{champion}.0.0"


def _cycle_json(cycle: Cycle) -> dict[str, Any]:
    return {
        "id": cycle.cycle_id,
        "number": cycle.number,
        "state": cycle.state,
        "trigger": cycle.trigger,
        "since": int(cycle.steps[-1].created_at.timestamp()),
    }


def _duel_json(live: LiveDuel) -> dict[str, Any]:
    return {
        "id": live.duel.duel_id,
        "champion": live.duel.champion,
        "challenger": live.duel.challenger,
        "wins": live.wins,
        "losses": live.losses,
        "ties": live.ties,
        "raters": live.raters,
        "picks": live.picks,
        "picks_to_go": live.to_go,
        "e_value": live.e_value,
        "win_rate": live.rate.mean,
        "ci95": [live.rate.lo, live.rate.hi],
    }


def _verdict_json(view: CycleView) -> dict[str, Any]:
    assert view.verdict is not None, "last_verdict gives judged cycles only"
    return {
        "cycle": view.cycle.number,
        "version": view.challenger,
        "kind": view.verdict.kind,
        "text": view.verdict.text,
        "reasons": [asdict(reason) for reason in view.verdict.reasons],
        "at": None if view.judged_at is None else int(view.judged_at.timestamp()),
    }
