"""A canary: a version answers a share of the users before it may answer all, and is withdrawn where a live guard breaks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import Config
from pairloop.errors import ConflictError, NotFoundError
from pairloop.loop.deploy.aliases import end_canary, end_duel, known, load_with_parent, refuse_removed
from pairloop.loop.deploy.guards import Seen, broken, is_known, look
from pairloop.policy.protocols import Policy
from pairloop.store import Store, audit, canaries, duels, events, new_id, traffic, versions
from pairloop.store.audit import SCHEDULER, AuditAction
from pairloop.store.canaries import Canary
from pairloop.types import Alias, Duel, Reason


@dataclass(frozen=True, slots=True)
class Standing:
    """How a version under watch does.

    ``answers``: requests sent to it, answered or failed; none of the shadow. ``broken``: what broke, in words. ``is_over``: a
    canary has lasted long enough.
    """

    version: int
    former: int
    since: datetime
    answers: int
    reasons: tuple[Reason, ...]
    broken: str | None
    is_over: bool = False

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "since": self.since.isoformat()}


def start_canary(
    store: Store,
    policy: Policy,
    config: Config,
    *,
    number: int,
    share: float | None = None,
    reason: str,
    actor: str = SCHEDULER,
    cycle_id: str | None = None,
    replacing: int | None = None,
    also: Callable[[Connection, Canary], None] = lambda _c, _canary: None,
) -> Canary:
    """Have version ``number`` answer ``share`` of the users (by default ``deploy.canary_share``) beside the champion.

    ConflictError where it is the champion, another canary is on, a duel is open that is not of ``cycle_id``, or ``replacing``
    is no longer the champion; NotFoundError for an unknown version.
    """
    version, reason = known(store, config.policy.name, number), store.kept_words(reason)
    load_with_parent(store, policy, version)
    faults.reach("canary.after_probe")

    def commit(c: Connection) -> Canary:
        champion = versions.alias(c, version.policy, Alias.CHAMPION)
        if champion is None:
            raise NotFoundError(f"no policy {version.policy}: `pairloop serve` registers its base", param="policy")
        if champion == number:
            raise ConflictError(f"{version.name} is the champion already")
        refuse_removed(c, version.policy, number)
        if replacing is not None and champion != replacing:
            raise ConflictError(
                f"{version.policy}@{replacing} is no longer the champion; {version.name} was measured against it"
            )
        duel = duels.current(c, version.policy)
        if duel is not None and duel.cycle_id != cycle_id:
            raise ConflictError(
                f"{version.policy}@{duel.challenger} is duelling ({duel.duel_id}): wait for its end, or promote with no canary"
            )
        chosen = config.deploy.canary_share if share is None else share
        now = datetime.now(UTC)
        canary = Canary(new_id("canary"), version.policy, number, champion, chosen, secrets.token_hex(8), cycle_id, reason, now)
        canaries.open(c, canary)
        faults.reach("canary.opened_in_transaction")
        versions.set_alias(c, version.policy, Alias.CANARY, number)
        details = {"champion": champion, "share": chosen, "cycle_id": cycle_id}
        audit.record(c, AuditAction.CANARY_START, actor=actor, subject=version.name, reason=reason, details=details, at=now)
        also(c, canary)
        return canary

    canary = store.write(commit)
    faults.reach("canary.after_open")
    return canary


def stop_canary(
    store: Store,
    policy_name: str,
    *,
    reason: str,
    actor: str = SCHEDULER,
    canary_id: str | None = None,
    details: Mapping[str, Any] | None = None,
    also: Callable[[Connection], None] = lambda _c: None,
) -> Canary:
    """Withdraw the canary: the champion answers everybody again, and a duel of the two ends. ConflictError where none is on,
    or another one than ``canary_id``. ``details``: the evidence, for the audit trail."""
    reason = store.kept_words(reason)

    def commit(c: Connection) -> Canary:
        canary = canaries.current(c, policy_name)
        if canary is None or (canary_id is not None and canary.canary_id != canary_id):
            raise ConflictError(f"no canary of {policy_name} is on" + (f" any more ({canary_id})" if canary_id else ""))
        at = datetime.now(UTC)
        end_canary(c, policy_name, "withdrawn", reason, at)
        faults.reach("canary.closed_in_transaction")
        end_duel(c, policy_name, at)
        versions.record_promotion(
            c,
            policy_name,
            number=canary.version,
            previous=canary.champion,
            action="retire",
            reason=reason,
            cycle_id=canary.cycle_id,
            at=at,
        )
        subject, told = f"{policy_name}@{canary.version}", {"canary_id": canary.canary_id, **(details or {})}
        audit.record(c, AuditAction.CANARY_STOP, actor=actor, subject=subject, reason=reason, details=told, at=at)
        events.guard_broken(c, policy_name, canary.version, told, reason, at)
        also(c)
        return canary

    canary = store.write(commit)
    faults.reach("canary.after_withdrawal")
    return canary


def canary_standing(c: Connection, config: Config, canary: Canary, now: datetime) -> Standing:
    """The canary's answers so far beside the champion's of the same time."""
    found = _compared(c, config, canary.version, canary.champion, canary.opened_at, now)
    is_late = now - canary.opened_at >= timedelta(hours=config.deploy.canary_hours)
    is_over = found.broken is None and is_late and found.answers >= config.deploy.canary_requests and is_known(found.reasons)
    return Standing(found.version, found.former, found.since, found.answers, found.reasons, found.broken, is_over)


def duel_standing(c: Connection, config: Config, duel: Duel, now: datetime) -> Standing:
    """The challenger's answers in its duel, and in the shadow, beside the champion's of the same time."""
    return _compared(c, config, duel.challenger, duel.champion, duel.opened_at, now)


def champion_standing(c: Connection, config: Config, now: datetime) -> Standing | None:
    """The new champion's answers beside the former one's before the promotion; None where nobody is under watch."""
    name, span = config.policy.name, timedelta(hours=config.deploy.watch_hours)
    moves = [event for event in versions.promotions(c, name) if event.action != "retire"]
    last = moves[-1] if moves else None
    if last is None or last.action != "promote" or last.previous is None or now - last.created_at >= span:
        return None
    if versions.alias(c, name, Alias.CHAMPION) != last.number:
        return None
    return _compared(c, config, last.number, last.previous, last.created_at, now, before=span)


def standing(c: Connection, config: Config, now: datetime) -> Standing | None:
    """Of whoever is under watch: the canary, else the challenger, else the new champion."""
    name = config.policy.name
    canary, duel = canaries.current(c, name), duels.current(c, name)
    if canary is not None:
        return canary_standing(c, config, canary, now)
    return duel_standing(c, config, duel, now) if duel is not None else champion_standing(c, config, now)


def _compared(
    c: Connection,
    config: Config,
    new: int,
    former: int,
    since: datetime,
    now: datetime,
    *,
    before: timedelta | None = None,
) -> Standing:
    """``before``: the former version is taken from so long before ``since``, else from the same time."""
    name, until = config.policy.name, now + timedelta(minutes=1)
    begin, end = (since, until) if before is None else (since - before, since)
    mine = Seen(
        traffic.by_minute(c, name, new, since, until),
        traffic.thumbs(c, name, new, since, until),
    )
    theirs = Seen(traffic.by_minute(c, name, former, begin, end), traffic.thumbs(c, name, former, begin, end))
    reasons = look(mine, theirs, config.deploy, since)
    answers = sum(counts.shown for counts in mine.minutes.values())
    return Standing(new, former, since, answers, tuple(reasons), broken(reasons))
