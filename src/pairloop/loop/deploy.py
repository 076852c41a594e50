"""Deploy: put a version where it can answer, and move the aliases. One transaction per move.

``open_duel`` makes a challenger, ``promote`` makes it champion, ``retire`` archives it, ``rollback`` brings the previous
champion back. A version is loaded and probed before any alias names it. With ``also`` a caller's own records (a cycle's step,
its verdict) are committed in the same transaction, so that nothing stands between the move and its record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop import faults
from pairloop.errors import ConflictError, EngineError, ModelError, NotFoundError
from pairloop.policy.protocols import Policy, SampleRequest, TokenSequence
from pairloop.store import Store, duels, new_id, versions
from pairloop.store.versions import Promotion
from pairloop.types import BASE_VERSION, Alias, Duel, Message, SamplingParams, Version

logger = logging.getLogger(__name__)

PROBE_PROMPT = (Message("user", "Hello, can you help me?"),)
PROBE_ANSWER = "Hello! I am happy to help you."
_PROBE_TOKENS = 8
_PROBE_TIMEOUT_S = 120.0

Also = Callable[[Connection], None]


def _nothing(_: Connection) -> None:
    return None


def load(policy: Policy, version: Version, parent: Version | None) -> None:
    """Load and probe a version: it is loaded, it answers a known prompt, and it is not its parent in disguise.

    An engine that ignores an adapter, or serves a cached one, gives the parent's log-probs to the last bit: EngineError. They
    are compared on what the version answers, and on a given answer where the model's template can write one.
    """
    policy.load(version)
    if version.number not in policy.loaded():
        raise EngineError(f"{version.name}: the engine took it, but does not list it as loaded")
    prompt = policy.tokens.encode_prompt(PROBE_PROMPT)
    params = SamplingParams(max_tokens=_PROBE_TOKENS, seed=0)
    completions = policy.sample(SampleRequest(prompt, version.number, params=params)).result(timeout=_PROBE_TIMEOUT_S)
    if not completions or not completions[0].token_ids:
        raise EngineError(f"{version.name}: gave no answer to a known prompt")
    if version.number == BASE_VERSION or parent is None:
        return
    policy.load(parent)
    known = [TokenSequence(prompt, completions[0].token_ids)]
    try:
        known.append(TokenSequence(prompt, policy.tokens.encode_completion(PROBE_PROMPT, PROBE_ANSWER)))
    except ModelError as error:  # a template that breaks the prefix rule serves all the same
        logger.info("%s is probed on its own answer only: %s", version.name, error)
    if policy.logps(version.number, known) == policy.logps(parent.number, known):
        raise EngineError(
            f"{version.name}: gives the log-probs of its parent {parent.name}: the engine did not load its weights"
        )


def open_duel(
    store: Store,
    policy: Policy,
    *,
    cycle_id: str,
    champion: Version,
    challenger: Version,
    also: Callable[[Connection, Duel], None],
) -> Duel:
    """Load and probe the challenger, then set its alias and open the duel."""
    load(policy, challenger, champion)
    duel = Duel(new_id("duel"), cycle_id, challenger.policy, champion.number, challenger.number, datetime.now(UTC))

    faults.reach("duel.before_open")

    def commit(c: Connection) -> None:
        versions.set_alias(c, duel.policy, Alias.CHALLENGER, duel.challenger)
        duels.open(c, duel)
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
    replacing: int | None = None,
    cycle_id: str | None = None,
    also: Also = _nothing,
) -> Promotion:
    """Make ``version`` the champion: one alias write, its record, and the end of the duel.

    ConflictError where it is the champion already, or where ``replacing`` is no longer.
    """
    with store.reading() as c:
        parent = None if version.parent is None else versions.get(c, version.policy, version.parent)
    faults.reach("promote.before_load")
    load(policy, version, parent)
    faults.reach("promote.after_probe")

    def commit(c: Connection) -> Promotion:
        promotion = _move(c, version.policy, version.number, "promote", reason, cycle_id)
        if replacing is not None and promotion.previous != replacing:
            raise ConflictError(
                f"{version.policy}@{replacing} is no longer the champion; {version.name} was measured against it"
            )
        also(c)
        return promotion

    promotion = store.write(commit)
    faults.reach("promote.after_commit")
    return promotion


def promote_by_hand(store: Store, policy: Policy, policy_name: str, *, number: int, reason: str) -> Promotion:
    """Promote past the gate; an open duel ends, and its cycle is held when it is next looked at."""
    with store.reading() as c:
        version = versions.get(c, policy_name, number)
    if version is None:
        raise NotFoundError(f"{policy_name} has no version {number}; `pairloop versions` names them", param="version")
    return promote(store, policy, version, reason=reason)


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
        also(c)

    store.write(commit)
    faults.reach("retire.before_unload")
    policy.unload(version.number)


def rollback(store: Store, policy_name: str, *, to: int | None = None, reason: str, policy: Policy | None = None) -> Promotion:
    """Make an earlier champion the champion again; the next cycle's parent is that version.

    ``to`` defaults to the champion before the present one. With ``policy`` the version is loaded and probed first; without
    (the command line beside a running server) the server loads it with its next answer. ConflictError where there is nothing
    to roll back to, NotFoundError for an unknown version.
    """
    with store.reading() as c:
        number = _rollback_target(c, policy_name, to)
        version = versions.get(c, policy_name, number)
    if policy is not None and version is not None:
        load(policy, version, None)
    return store.write(lambda c: _move(c, policy_name, _rollback_target(c, policy_name, number), "rollback", reason, None))


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
    c: Connection, policy_name: str, number: int, action: versions.PromotionAction, reason: str, cycle_id: str | None
) -> Promotion:
    """The alias write of a promotion or rollback, with its record and the end of the duel."""
    at = datetime.now(UTC)
    previous = versions.alias(c, policy_name, Alias.CHAMPION)
    if previous == number:
        raise ConflictError(f"{policy_name}@{number} is the champion already")
    versions.set_alias(c, policy_name, Alias.CHAMPION, number)
    faults.reach("alias.moved_in_transaction")
    end_duel(c, policy_name, at)
    versions.record_promotion(
        c, policy_name, number=number, previous=previous, action=action, reason=reason, cycle_id=cycle_id, at=at
    )
    return Promotion(policy_name, number, previous, action, reason, cycle_id, at)


def end_duel(c: Connection, policy_name: str, at: datetime) -> None:
    """No duel outlives a change of its two sides."""
    versions.set_alias(c, policy_name, Alias.CHALLENGER, None)
    duel = duels.current(c, policy_name)
    if duel is not None:
        duels.close(c, duel.duel_id, at)
