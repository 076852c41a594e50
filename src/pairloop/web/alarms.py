"""What needs somebody's care, in words, each with the page where it can be looked into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Literal

from pairloop.types import CycleState
from pairloop.web.overview import Overview
from pairloop.web.status import Status

HELD_TOO_OFTEN = 3
"""Cycles in a row that ended without a promotion."""
LITTLE_DISK, NO_DISK = 0.10, 0.03
MANY_WRITES = 200
KEY_ENDS_SOON_S = 7 * 86_400
REMEMBERED = timedelta(days=7)
GUARD_BROKE = "a live guard broke"


@dataclass(frozen=True, slots=True)
class Alarm:
    """``page``: the icon of the page that it leads to (`menu.path_of`), or a path."""

    level: Literal["bad", "warn"]
    text: str
    page: str


def alarms(status: Status, found: Overview, *, draining: bool, now: datetime | None = None) -> list[Alarm]:
    """The bad ones first."""
    every = [*_scheduling(status, draining), *_guards(found, now or datetime.now(UTC)), *_cycles(status), *_upkeep(found)]
    return sorted(every, key=lambda alarm: alarm.level != "bad")


def _scheduling(status: Status, draining: bool) -> Iterator[Alarm]:
    scheduler = status.scheduler
    if draining:
        yield Alarm("warn", "This server is about to stop: it takes no new requests.", "health")
    if scheduler.get("error"):
        yield Alarm("bad", f"The loop is in trouble: {scheduler['error']}", "health")
    elif scheduler and not scheduler.get("running"):
        yield Alarm("bad", "Nothing turns the loop: its thread has stopped.", "health")
    if not status.now.enabled:
        yield Alarm("warn", "The schedule is paused: cycles begin only when somebody asks for one.", "schedule")


def _guards(found: Overview, now: datetime) -> Iterator[Alarm]:
    if found.guards is not None and found.guards.broken is not None:
        yield Alarm("bad", f"A live guard broke on @{found.guards.version}: {found.guards.broken}", _page(found.guards.version))
    for move in reversed(found.moves):
        if move.action == "rollback" and move.reason.startswith(GUARD_BROKE) and now - move.created_at < REMEMBERED:
            text = f"@{move.previous} was rolled back to @{move.number} on {move.created_at:%Y-%m-%d %H:%M} UTC: {move.reason}"
            yield Alarm("bad", text, _page(move.previous))
            return


def _cycles(status: Status) -> Iterator[Alarm]:
    ended = [view for view in status.cycles if view.cycle.state.is_terminal]
    if ended and ended[0].cycle.state is CycleState.FAILED:
        reason = ended[0].cycle.steps[-1].record.get("reason", "no reason was left")
        yield Alarm("bad", f"Cycle {ended[0].cycle.number} failed: {reason}", "runs")
    useless = (CycleState.HELD, CycleState.REJECTED)
    row = len(list(takewhile(lambda view: view.cycle.state in useless, ended)))
    if row >= HELD_TOO_OFTEN:
        text = f"The last {row} cycles brought no promotion: too few picks to decide, or the training does not help."
        yield Alarm("warn", text, "gate")


def _upkeep(found: Overview) -> Iterator[Alarm]:
    readings = found.readings
    yield from _disks({label: value for (name, label), value in readings.items() if name == "disk_free_ratio"})
    for (name, label), value in sorted(readings.items()):
        if name == "lease_expires_in_seconds" and value < 0:
            yield Alarm("bad", f"The lease {label} ran out {-value:.0f} s ago: whoever held it is silent.", "health")
        if name == "replica_ready" and not value:
            yield Alarm("warn", f"The engine {label} gets no requests: it is not ready.", "health")
    if readings.get(("store_up", ""), 1.0) == 0:
        yield Alarm("bad", "The database cannot be read.", "health")
    waiting = readings.get(("writes_waiting", ""), 0.0)
    if waiting > MANY_WRITES:
        yield Alarm("warn", f"{waiting:,.0f} writes wait for the disk.", "health")
    if found.quarantined:
        yield Alarm("warn", f"The votes of {found.quarantined:,} raters are set aside (quarantine).", "raters")
    expires_s = readings.get(("key_expires_in_seconds", ""))
    if expires_s is not None and expires_s < KEY_ENDS_SOON_S:
        yield Alarm("warn", f"An API key expires in {expires_s / 86_400:.1f} days.", "keys")


def _disks(free: Mapping[str, float]) -> Iterator[Alarm]:
    """Once for each disk, however many folders lie on it."""
    for share in sorted(set(free.values())):
        if share < LITTLE_DISK:
            folders = sorted(folder for folder, its in free.items() if its == share)
            what = f"{' and '.join(folders)} folder{'s' if len(folders) > 1 else ''}"
            yield Alarm("bad" if share < NO_DISK else "warn", f"The disk of the {what} has {100 * share:.0f} % left.", "health")


def _page(version: int | None) -> str:
    return "/versions" if version is None else f"/versions/{version}"
