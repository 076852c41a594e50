"""Moving the aliases, one transaction per move, with its line in the audit trail.

``open_duel`` makes a challenger, ``promote`` makes it champion, ``retire`` archives it, ``rollback`` brings the previous
champion back. A version is loaded and probed before any alias names it. With ``also`` a caller's own records (a cycle's step,
its verdict) are committed in the same transaction, so that nothing stands between the move and its record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection

from pairloop import faults
from pairloop.errors import ConflictError, NotFoundError
from pairloop.loop.deploy.probe import answers, load
from pairloop.policy.protocols import Policy
from pairloop.store import Store, audit, canaries, duels, events, new_id, removed, versions
from pairloop.store.audit import SCHEDULER, AuditAction
from pairloop.store.versions import Promotion
from pairloop.types import BASE_VERSION, Alias, Duel, DuelKind, Version

Also = Callable[[Connection], None]


def _nothing(_: Connection) -> None:
    return None


def open_duel(
    store: Store,
    policy: Policy,
    *,
    cycle_id: str,
    champion: Version,
    challenger: Version,
    beside_base: bool = False,
    also: Callable[[Connection, Duel], None],
) -> Duel:
    """Load and probe the challenger, then set its alias and open the duel.

    ``beside_base`` opens the seed duel with it, unless the base is the champion: then the duel itself is against the base.
    """
    load(policy, challenger, champion)
    duel = Duel(new_id("duel"), cycle_id, challenger.policy, champion.number, challenger.number, datetime.now(UTC))
    seed = replace(duel, duel_id=new_id("duel"), champion=BASE_VERSION, kind=DuelKind.SEED)

    faults.reach("duel.before_open")

    def commit(c: Connection) -> None:
        refuse_removed(c, duel.policy, duel.challenger)
        versions.set_alias(c, duel.policy, Alias.CHALLENGER, duel.challenger)
        duels.open(c, duel)
        if beside_base and duel.champion != BASE_VERSION:
            duels.open(c, seed)
        also(c, duel)

    store.write(commit)
    faults.reach("duel.after_open")
    return duel


def promote(
    store: Store,
    policy: Policy,
    version: Version,
    *,
    reason: str,
    actor: str = SCHEDULER,
    replacing: int | None = None,
    canary_id: str | None = None,
    cycle_id: str | None = None,
    also: Also = _nothing,
) -> Promotion:
    """Make ``version`` the champion: one alias write, its record, and the end of duel and canary.

    ConflictError where it is the champion already, where ``replacing`` is no longer, or where ``canary_id`` has ended.
    """
    faults.reach("promote.before_load")
    load_with_parent(store, policy, version)
    faults.reach("promote.after_probe")

    def commit(c: Connection) -> Promotion:
        canary = canaries.current(c, version.policy)
        if canary_id is not None and (canary is None or canary.canary_id != canary_id):  # ended while it was loaded and probed
            raise ConflictError(f"{version.name} is no longer on as canary ({canary_id}): it is not promoted")
        promotion = _move(c, version.policy, version.number, "promote", reason, actor=actor, cycle_id=cycle_id)
        if replacing is not None and promotion.previous != replacing:
            raise ConflictError(
                f"{version.policy}@{replacing} is no longer the champion; {version.name} was measured against it"
            )
        also(c)
        return promotion

    promotion = store.write(commit)
    faults.reach("promote.after_commit")
    return promotion


def load_with_parent(store: Store, policy: Policy, version: Version) -> None:
    """Load and probe a version beside the parent that the store names."""
    with store.reading() as c:
        parent = None if version.parent is None else versions.get(c, version.policy, version.parent)
    load(policy, version, parent)


def promote_by_hand(
    store: Store, policy: Policy, policy_name: str, *, number: int, reason: str, actor: str = SCHEDULER
) -> Promotion:
    """Promote past the gate; an open duel ends, and its cycle is held when it is next looked at."""
    version = known(store, policy_name, number)
    return promote(store, policy, version, reason=store.kept_words(reason), actor=actor)


def known(store: Store, policy_name: str, number: int) -> Version:
    """The version; NotFoundError where there is none of that number."""
    with store.reading() as c:
        version = versions.get(c, policy_name, number)
        refuse_removed(c, policy_name, number)
    if version is None:
        raise NotFoundError(f"{policy_name} has no version {number}; `pairloop versions` names them", param="version")
    return version


def refuse_removed(c: Connection, policy_name: str, number: int) -> None:
    """Asked in the transaction that names a version, too: its weights may have gone by their age since it was loaded."""
    version = versions.get(c, policy_name, number)
    if version is not None and removed.is_removed(c, version.path):
        raise ConflictError(
            f"the weights of {version.name} were removed by their age; `pairloop rebuild {number}` makes them again"
        )


def retire(
    store: Store, policy: Policy, version: Version, *, reason: str, cycle_id: str | None = None, also: Also = _nothing
) -> None:
    """Archive a challenger: the duel is closed, the alias removed, the weights stay callable by number."""

    def commit(c: Connection) -> None:
        at = datetime.now(UTC)
        champion = versions.alias(c, version.policy, Alias.CHAMPION)
        end_duel(c, version.policy, at)
        versions.record_promotion(
            c,
            version.policy,
            number=version.number,
            previous=champion,
            action="retire",
            reason=reason,
            cycle_id=cycle_id,
            at=at,
        )
        audit.record(c, AuditAction.RETIRE, actor=SCHEDULER, subject=version.name, reason=reason, at=at)
        also(c)

    store.write(commit)
    faults.reach("retire.before_unload")
    policy.unload(version.number)


def rollback(
    store: Store,
    policy_name: str,
    *,
    to: int | None = None,
    reason: str,
    policy: Policy | None = None,
    actor: str = SCHEDULER,
    details: Mapping[str, Any] | None = None,
    replacing: int | None = None,
) -> Promotion:
    """Make an earlier champion the champion again; the next cycle's parent is that version.

    ``to`` defaults to the champion before the present one. With ``policy`` the version is loaded and probed first; without
    (the command line beside a running server) the server loads it with its next answer. ``details``: the evidence, for the
    audit trail. ConflictError where there is nothing to roll back to or ``replacing`` is no longer the champion,
    NotFoundError for an unknown version.
    """
    reason = store.kept_words(reason)
    with store.reading() as c:
        number = _rollback_target(c, policy_name, to)
        version = versions.get(c, policy_name, number)
    if policy is not None and version is not None:
        if number in policy.loaded():  # kept warm: it answers at once
            answers(policy, version)
        else:
            load(policy, version, None)
    faults.reach("rollback.after_probe")

    def commit(c: Connection) -> Promotion:
        champion = versions.alias(c, policy_name, Alias.CHAMPION)
        if replacing is not None and champion != replacing:
            raise ConflictError(f"{policy_name}@{replacing} is no longer the champion; that is version {champion}")
        target = _rollback_target(c, policy_name, number)
        if champion is not None:
            events.guard_broken(c, policy_name, champion, details or {}, reason, datetime.now(UTC))
        return _move(c, policy_name, target, "rollback", reason, actor=actor, details=details)

    rolled_back = store.write(commit)
    faults.reach("rollback.after_commit")
    return rolled_back


def _rollback_target(c: Connection, policy_name: str, to: int | None) -> int:
    champion = versions.alias(c, policy_name, Alias.CHAMPION)
    if champion is None:
        raise NotFoundError(f"no policy {policy_name}: `pairloop serve` registers its base", param="policy")
    earlier = versions.past_champions(versions.promotions(c, policy_name))[:-1]
    if to is None:
        if not earlier:
            raise ConflictError(f"{policy_name}@{champion} is the first champion: there is nothing to roll back to")
        return earlier[-1]
    if versions.get(c, policy_name, to) is None:
        raise NotFoundError(f"{policy_name} has no version {to}; `pairloop versions` names them", param="version")
    if to == champion:
        raise ConflictError(f"{policy_name}@{to} is the champion already")
    if to not in earlier:
        known = ", ".join(map(str, dict.fromkeys(earlier))) or "none"
        raise ConflictError(
            f"{policy_name}@{to} is no earlier champion (those are: {known}); `pairloop promote` takes any version"
        )
    return to


def _move(
    c: Connection,
    policy_name: str,
    number: int,
    action: Literal["promote", "rollback"],
    reason: str,
    *,
    actor: str,
    cycle_id: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> Promotion:
    """The alias write of a promotion or rollback, with its records and the end of duel and canary."""
    at = datetime.now(UTC)
    previous = versions.alias(c, policy_name, Alias.CHAMPION)
    if previous == number:
        raise ConflictError(f"{policy_name}@{number} is the champion already")
    refuse_removed(c, policy_name, number)
    versions.set_alias(c, policy_name, Alias.CHAMPION, number)
    faults.reach("alias.moved_in_transaction")
    end_duel(c, policy_name, at)
    end_canary(c, policy_name, "promoted" if _is_canary(c, policy_name, number) else "withdrawn", reason, at)
    moved = Promotion(policy_name, number, previous, action, reason, cycle_id, at)
    versions.record_promotion(
        c, policy_name, number=number, previous=previous, action=action, reason=reason, cycle_id=cycle_id, at=at
    )
    told = {"previous": previous, "cycle_id": cycle_id, **(details or {})}
    audit.record(c, AuditAction(action), actor=actor, subject=f"{policy_name}@{number}", reason=reason, details=told, at=at)
    return moved


def end_duel(c: Connection, policy_name: str, at: datetime) -> None:
    """No duel outlives a change of its two sides, nor a seed duel the one beside it."""
    versions.set_alias(c, policy_name, Alias.CHALLENGER, None)
    duels.close_all(c, policy_name, at)


def end_canary(c: Connection, policy_name: str, outcome: canaries.Outcome, reason: str, at: datetime) -> None:
    """No canary outlives a change of the champion whose place it takes for some."""
    versions.set_alias(c, policy_name, Alias.CANARY, None)
    canary = canaries.current(c, policy_name)
    if canary is not None:
        canaries.close(c, canary.canary_id, outcome, reason, at)


def _is_canary(c: Connection, policy_name: str, number: int) -> bool:
    canary = canaries.current(c, policy_name)
    return canary is not None and canary.version == number
