"""The loop at a glance, for Home: the lane with its estimate of the time left, the figures, and where each comes from."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic

from prometheus_client import Histogram
from prometheus_client.core import Metric

from pairloop.config import Config
from pairloop.loop import deploy
from pairloop.loop.cycle import CycleStatus, round_of
from pairloop.loop.deploy import Standing
from pairloop.statistics import percent
from pairloop.store import Store, counts, versions
from pairloop.store.versions import Promotion
from pairloop.types import BASE_VERSION, Cycle, CycleState
from pairloop.web.curve import Point
from pairloop.web.metrics import Metrics
from pairloop.web.status import Status

FRESH_S = 5.0
"""How old the figures that are dear to count may be: an open page asks again at every tick."""
CHAT = "/v1/chat/completions"
Readings = Mapping[tuple[str, str], float]
"""(metric's name, value of its label or nothing) → value."""

_LANE = (
    ("collect", ()),
    ("pairs", (CycleState.BUILDING,)),
    ("train", (CycleState.TRAINING,)),
    ("evaluate", (CycleState.CHECKING,)),
    ("gate", (CycleState.DUELLING,)),
    ("deploy", (CycleState.CANARY,)),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the lane; ``when``: done, now or todo. ``text``: what there is to say of it."""

    word: str
    when: str
    text: str


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds until a chat's response began, of ``n`` since this server started, interpolated within the histogram's bars."""

    p50_s: float | None
    p99_s: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Overview:
    """What Home is rendered from, beside the status."""

    lane: tuple[Step, ...]
    left_s: float | None
    point: Point | None
    picks_today: int
    latency: Latency
    readings: Readings
    moves: tuple[Promotion, ...]
    guards: Standing | None
    quarantined: int

    @property
    def champion_since(self) -> datetime | None:
        """None for a base that was never replaced."""
        return next((one.created_at for one in reversed(self.moves) if one.action != "retire"), None)


@dataclass(frozen=True, slots=True)
class _Dear:
    picks_today: int
    readings: Readings
    guards: Standing | None


class OverviewBoard:
    """Reads what Home shows; what is dear to count is kept for `FRESH_S`. Any thread."""

    def __init__(self, store: Store, config: Config, metrics: Metrics) -> None:
        self._store = store
        self._config = config
        self._metrics = metrics
        self._lock = threading.Lock()
        self._dear: tuple[float, _Dear] = (float("-inf"), _Dear(0, {}, None))

    def read(self, status: Status, *, now: datetime | None = None) -> Overview:
        now = now or datetime.now(UTC)
        dear = self._fresh(now)
        with self._store.reading() as c:
            moves = tuple(versions.promotions(c, self._config.policy.name))
        return Overview(
            lane=lane_of(status.now, _running(status)),
            left_s=left_s(status.now, now),
            point=next((one for one in status.points if one.contest.challenger == status.now.champion), None),
            picks_today=dear.picks_today,
            latency=latency_of(self._metrics.latency),
            readings=dear.readings,
            moves=moves,
            guards=dear.guards,
            quarantined=int(dear.readings.get(("quarantined_raters", ""), 0)),
        )

    def _fresh(self, now: datetime) -> _Dear:
        with self._lock:
            read_at, found = self._dear
            if monotonic() - read_at > FRESH_S:
                midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
                with self._store.reading() as c:
                    picks = counts.picks_since(c, self._config.policy.name, midnight)
                    guards = deploy.standing(c, self._config, now)
                found = _Dear(picks, readings_of(self._metrics.families()), guards)
                self._dear = (monotonic(), found)
            return found


def lane_of(now: CycleStatus, running: Cycle | None) -> tuple[Step, ...]:
    """The six steps; an idle loop collects. ``running``: the cycle that has not ended."""
    at = next((place for place, (_, states) in enumerate(_LANE) if now.state in states), 0)
    words = _words(now, running)
    return tuple(
        Step(word, "now" if place == at else "done" if place < at else "todo", words.get(word, ""))
        for place, (word, _) in enumerate(_LANE)
    )


def _running(status: Status) -> Cycle | None:
    return next((view.cycle for view in status.cycles if view.cycle.cycle_id == status.now.cycle_id), None)


def _words(now: CycleStatus, running: Cycle | None) -> dict[str, str]:
    wanted = f" of {now.min_pairs:,}" if now.min_pairs else ""
    words = {"collect": f"{now.new_pairs:,}{wanted} new pairs"}
    words |= {} if running is None else _done(running)
    progress = "" if now.progress is None else f"{now.progress.done:,} of {now.progress.of:,}"
    if now.state == CycleState.TRAINING and progress:
        words["train"] = f"step {progress}"
    if now.duel is not None:
        words["gate"] = f"{now.duel.picks:,} picks, about {now.duel.to_go:,} to go"
    if now.canary is not None:
        canary = now.canary
        words["deploy"] = f"canary of {percent(canary.share)}, {canary.answers:,} of {canary.answers_needed:,} answers"
    return words


def _done(cycle: Cycle) -> dict[str, str]:
    """What the steps behind a running cycle came to."""
    found = {}
    if (built := cycle.record(CycleState.TRAINING)) is not None and "n_train" in built:
        found["pairs"] = f"{built['n_train']:,} to train on, {built.get('n_heldout', 0):,} held out"
    if (trained := round_of(cycle)) is not None:
        found["train"] = f"@{trained.version}, {trained.steps:,} steps"
    report = (cycle.record(CycleState.DUELLING) or {}).get("report")
    if report is not None:
        found["evaluate"] = f"{report['samples']:,} samples on {report['prompts']:,} prompts"
    return found


def left_s(now: CycleStatus, at: datetime) -> float | None:
    """Seconds that the running step still takes if it goes on as it went: an estimate. None where nothing is known."""
    if now.progress is None or now.since is None or not 0 < now.progress.done <= now.progress.of:
        return None
    elapsed_s = (at - now.since).total_seconds()
    return elapsed_s * (now.progress.of - now.progress.done) / now.progress.done


def latency_of(histogram: Histogram) -> Latency:
    """Of the chat's route alone."""
    bars: dict[float, float] = {}
    for family in histogram.collect():
        for sample in family.samples:
            if sample.name.endswith("_bucket") and sample.labels.get("route") == CHAT:
                bars[float(sample.labels["le"])] = sample.value
    n = int(bars.get(float("inf"), 0))
    return Latency(quantile(bars, 0.5), quantile(bars, 0.99), n)


def quantile(bars: Mapping[float, float], q: float) -> float | None:
    """From cumulative counts by upper bound; None where it lies beyond the last bound, or nothing was counted."""
    rank, below, under = q * bars.get(float("inf"), 0), 0.0, 0.0
    if not rank:
        return None
    for bound in sorted(bars):
        if bars[bound] >= rank:
            share = (rank - under) / (bars[bound] - under)
            return None if bound == float("inf") else below + share * (bound - below)
        below, under = bound, bars[bound]
    return None


def readings_of(families: Iterable[Metric]) -> dict[tuple[str, str], float]:
    """Gauges with one label at most, without their prefix."""
    found: dict[tuple[str, str], float] = {}
    for family in families:
        if family.type == "gauge":
            for sample in family.samples:
                if len(sample.labels) <= 1:
                    found[sample.name.removeprefix("pairloop_"), next(iter(sample.labels.values()), "")] = sample.value
    return found


def is_new(status: Status) -> bool:
    """Nothing was asked here yet, and nothing was trained."""
    return status.group_count == 0 and status.now.champion == BASE_VERSION and not status.cycles
