"""Where the loop stands, for all who watch: ``loop.cycle.status`` with the history behind it, read at most twice a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from time import monotonic
from typing import Any

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.loop import cycle as loop_cycle
from pairloop.loop import pairs
from pairloop.loop.cycle import AgainstBase, CanaryStatus, CycleStatus, DuelStatus, LastVerdict
from pairloop.loop.pairs import PairCount
from pairloop.store import Store, cycles, duels, groups, verdicts, versions
from pairloop.types import Cycle, CycleState, Duel, Interval, Verdict, VerdictKind
from pairloop.web.curve import Contest, Point, as_json, curve

FRESH_S = 0.5
STAGES = (CycleState.BUILDING, CycleState.TRAINING, CycleState.CHECKING, CycleState.DUELLING)
"""The stages that a cycle goes through, in order; then it ends."""
CYCLES_SHOWN = 200


@dataclass(frozen=True, slots=True)
class CycleView:
    """A cycle with what became of it; ``judged_at``: when the last verdict was given."""

    cycle: Cycle
    challenger: int | None
    verdict: Verdict | None
    judged_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """Where the loop stands ``now``, its past cycles (newest first) and the curve that they add up to."""

    now: CycleStatus
    version_count: int
    group_count: int
    cycles: tuple[CycleView, ...]
    points: tuple[Point, ...]
    scheduler: Mapping[str, Any]

    @property
    def revision(self) -> str:
        """Changes when the curve or the list of cycles does.

        It is taken from ``now``, which is read before the history: so a history may be newer than its revision, and is fetched
        once more, but never older.
        """
        now = self.now
        return f"{now.champion}.{now.last_cycle or 0}.{now.number or 0}.{now.state}"

    def as_json(self) -> dict[str, Any]:
        now = self.now
        return {
            "object": "status",
            "policy": now.policy,
            "champion": f"{now.policy}@{now.champion}",
            "challenger": None if now.challenger is None else f"{now.policy}@{now.challenger}",
            "versions": self.version_count,
            "groups": self.group_count,
            "pairs": {"new": now.new_pairs, "needed": now.min_pairs},
            "pending_trigger": now.pending,
            "cycle": _cycle_json(now),
            "progress": None if now.progress is None else now.progress._asdict(),
            "run": None if now.run is None else loop_cycle.run_json(now.run),
            "duel": None if now.duel is None else _duel_json(now.duel),
            "canary": None if now.canary is None else _canary_json(now.canary),
            "last_verdict": None if now.last_verdict is None else _verdict_json(now.last_verdict),
            "last_round": None if now.last_round is None else now.last_round.as_json(),
            "staleness": now.staleness,
            "curve": as_json(self.points),
            "scheduler": {**self.scheduler, "enabled": now.enabled} if self.scheduler else {},
            "revision": self.revision,
        }


class StatusBoard:
    """Reads the status and remembers it for a moment; picks are counted again only when one came. Any thread."""

    def __init__(self, store: Store, config: Config, scheduler_status: Callable[[], Mapping[str, Any]]) -> None:
        self._store = store
        self._config = config
        self._scheduler_status = scheduler_status
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._status: Status | None = None
        self._new_pairs: PairCount | None = None

    def read(self) -> Status:
        with self._lock:
            if self._status is None or monotonic() - self._read_at > FRESH_S:
                self._status = self._read(None if self._status is None else self._status.now)
                self._read_at = monotonic()
            return self._status

    def forget(self) -> None:
        """Have the next one who asks read anew."""
        with self._lock:
            self._read_at = float("-inf")

    def _read(self, earlier: CycleStatus | None) -> Status:
        new_pairs = self._new_pairs = pairs.counted_new(self._store, self._config, self._new_pairs)
        now = loop_cycle.status(self._store, self._config, earlier=earlier, new_pairs=new_pairs.number)
        with self._store.reading() as c:
            by_cycle = {duel.cycle_id: duel for duel in duels.list_(c, now.policy, CYCLES_SHOWN)}
            past = cycles.list_(c, now.policy, CYCLES_SHOWN)
            views = tuple(_view(c, cycle, by_cycle.get(cycle.cycle_id)) for cycle in past)
            return Status(
                now=now,
                version_count=len(versions.list_(c, now.policy)),
                group_count=groups.count(c, now.policy),
                cycles=views,
                points=tuple(curve(_contests(views, by_cycle, now.duel))),
                scheduler=self._scheduler_status(),
            )


def _view(c: Connection, cycle: Cycle, duel: Duel | None) -> CycleView:
    spoken = verdicts.for_cycle(c, cycle.cycle_id)
    at, last = spoken[-1] if spoken else (None, None)
    return CycleView(cycle, loop_cycle.challenger_of(cycle, duel), last, at)


def _contests(views: Sequence[CycleView], by_cycle: Mapping[str, Duel], live: DuelStatus | None) -> list[Contest]:
    """Oldest first: the duels that the gate judged, and the open one as it stands."""
    found = []
    for view in reversed(views):
        duel = by_cycle.get(view.cycle.cycle_id)
        champion = duel.champion if duel is not None else view.cycle.parent
        if view.challenger is not None and view.verdict is not None and view.verdict.kind is not VerdictKind.CONTINUE:
            counts = view.verdict
            votes, met = (counts.wins, counts.losses, counts.ties), _rate(loop_cycle.kept_against_base(view.cycle))
            found.append(Contest(view.challenger, champion, *votes, counts.kind.value, view.judged_at, met))
        elif live is not None and duel is not None and duel.duel_id == live.duel_id:
            votes, met = (live.wins, live.losses, live.ties), _rate(live.against_base)
            found.append(Contest(live.challenger, live.champion, *votes, None, duel.opened_at, met))
    return found


def _rate(met: AgainstBase | None) -> Interval | None:
    return None if met is None else met.win_rate


def _cycle_json(now: CycleStatus) -> dict[str, Any] | None:
    if now.since is None:
        return None
    return {
        "id": now.cycle_id,
        "number": now.number,
        "state": now.state,
        "trigger": now.trigger,
        "since": int(now.since.timestamp()),
    }


def _duel_json(live: DuelStatus) -> dict[str, Any]:
    return {
        "id": live.duel_id,
        "champion": live.champion,
        "challenger": live.challenger,
        "wins": live.wins,
        "losses": live.losses,
        "ties": live.ties,
        "raters": live.raters,
        "picks": live.picks,
        "picks_to_go": live.to_go,
        "e_value": live.e_value,
        "win_rate": live.win_rate.mean,
        "ci95": [live.win_rate.lo, live.win_rate.hi],
    }


def _canary_json(live: CanaryStatus) -> dict[str, Any]:
    return {**asdict(live), "until": int(live.until.timestamp())}


def _verdict_json(last: LastVerdict) -> dict[str, Any]:
    return {
        "cycle": last.cycle,
        "version": last.version,
        "kind": last.verdict.kind,
        "text": last.verdict.text,
        "reasons": [asdict(reason) for reason in last.verdict.reasons],
        "at": int(last.given_at.timestamp()),
    }
