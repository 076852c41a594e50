"""One function per state: run the stage, then record where it led. ``run`` goes on until the cycle ended or waits for picks."""

from __future__ import annotations

import dataclasses
import errno
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from pairloop.errors import NotFoundError, PairloopError, UnavailableError, UserError, place_of
from pairloop.loop import deploy, evaluate, gate, label, pairs
from pairloop.loop.cycle import canary, looks, smoothing, tracking
from pairloop.loop.cycle.context import CycleLease, Loop, training
from pairloop.loop.cycle.judging import base_record, standing
from pairloop.loop.cycle.turn import Turn
from pairloop.store import audit, canaries, cycles, datasets, duels, events, new_id, triggers, verdicts, versions
from pairloop.store.audit import AuditAction
from pairloop.telemetry import logs, traces
from pairloop.types import Alias, Cycle, CycleState, CycleStep, Duel, RunStatus, Verdict, VerdictKind, Version

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)

_CLOSED_BY = {
    VerdictKind.PROMOTE: CycleState.PROMOTED,
    VerdictKind.HOLD: CycleState.HELD,
    VerdictKind.REJECT: CycleState.REJECTED,
}


def _never() -> bool:
    return False


def run(loop: Loop, *, trigger: str, should_stop: Callable[[], bool] = _never, actor: str | None = None) -> Cycle:
    """Begin a cycle, go on with the one that was interrupted, or look at the duel again.

    Returns when the cycle ended, when it waits for people, or when ``should_stop`` said so; no lease is held then.
    ``actor``: who asked by hand for a new cycle, for the audit trail. A stage's failure ends the cycle as ``failed``, but one
    that comes while stopping is tried again at the next start. ConflictError while another thread or process moves a cycle of
    this policy, or took this one over: then nothing more was written. UnavailableError where the store or the disk is not to
    be had: the next call goes on from the last step.
    """
    with CycleLease(loop) as lease:
        loop = dataclasses.replace(loop, store=loop.store.fenced(lease.check))
        cycle = _open(loop, trigger, actor)
        while not cycle.state.is_terminal and not should_stop():
            turn = Turn(loop, cycle, lambda: should_stop() or lease.is_lost)
            try:
                with logs.about(policy=loop.name, cycle=cycle.number):
                    _STAGES[cycle.state](turn)
            except (PairloopError, OSError) as error:
                lease.insist()
                _raise_if_passing(error)
                if should_stop():  # the engine may be closed by now, and the stage failed of that
                    logger.info("cycle %d of %s stops while %s: %s", cycle.number, loop.name, cycle.state, error)
                    return _get(loop, cycle.cycle_id)
                _fail(turn, error)
            moved = _get(loop, cycle.cycle_id)
            if len(moved.steps) == len(cycle.steps):
                return moved
            cycle = moved
            tracking.moved(loop, cycle)
            traces.cycle_moved(cycle)
            logger.info("cycle %d of %s: %s", cycle.number, loop.name, cycle.state)
        return cycle


def record_failure(loop: Loop, error: BaseException) -> None:
    """End the cycle that was interrupted by an error nobody foresaw; one that duels or is a canary is left alone."""
    with loop.store.reading() as c:
        cycle = cycles.current(c, loop.name)
    if cycle is not None and not cycle.state.is_waiting:
        with CycleLease(loop) as lease:
            fenced = dataclasses.replace(loop, store=loop.store.fenced(lease.check))
            _fail(Turn(fenced, cycle, _never), error)


def _raise_if_passing(error: PairloopError | OSError) -> None:
    """A store that is away or a disk that is full says nothing about the cycle, and ends none."""
    if isinstance(error, OSError) and error.errno in _FULL:
        raise UnavailableError(f"{error.filename or 'the disk'}: {error.strerror}") from error
    if isinstance(error, UnavailableError):
        raise error


def _open(loop: Loop, trigger: str, actor: str | None) -> Cycle:
    """The cycle that has not ended, or a new one with the champion as parent; a new one uses up the pending trigger."""

    def begin(c: Connection) -> Cycle:
        current = cycles.current(c, loop.name)
        if current is not None:
            return current
        parent = versions.alias(c, loop.name, Alias.CHAMPION)
        if parent is None:
            raise NotFoundError(f"policy {loop.name} has no champion yet; `pairloop serve` registers its base", param="policy")
        now = datetime.now(UTC)
        first = CycleStep(CycleState.BUILDING, {"parent": parent, "trigger": trigger}, now)
        cycle = Cycle(new_id("cycle"), loop.name, cycles.next_number(c, loop.name), parent, trigger, now, (first,))
        cycles.insert(c, cycle)
        triggers.take(c, loop.name)
        if actor is not None:
            audit.record(c, AuditAction.CYCLE_START, actor=actor, subject=loop.name, reason=trigger)
        return cycle

    return loop.store.write(begin)


def _get(loop: Loop, cycle_id: str) -> Cycle:
    with loop.store.reading() as c:
        cycle = cycles.get(c, cycle_id)
    assert cycle is not None, "cycles are never deleted"
    return cycle


# --- the stages, by the state in which they run


def _build(turn: Turn) -> None:
    loop, cycle = turn.loop, turn.cycle
    labels = dataclasses.asdict(label.run(loop.store, loop.config))
    compiling = pairs.staged(loop.store, loop.policy.tokens, loop.config, parent=cycle.parent, should_stop=turn.should_stop)
    with compiling as new:
        if new is None:
            return  # stopped; the next start compiles again
        dataset = pairs.record(loop.store, loop.config, new, cycle_id=cycle.cycle_id)
    found = {"counts": dict(new.counts), "dropped": dict(new.dropped), "labels": labels}
    if dataset is None:
        turn.enter(CycleState.NOTHING_TO_TRAIN, {"reason": new.text, **found})
        return
    turn.enter(
        CycleState.TRAINING,
        {
            "dataset_id": dataset.dataset_id,
            "n_train": dataset.n_train,
            "n_heldout": dataset.n_heldout,
            **found,
            **smoothing.measure(loop),
        },
    )


def _train(turn: Turn) -> None:
    record, cycle = turn.recorded(CycleState.TRAINING), turn.cycle
    loop = smoothing.applied(turn.loop, record)
    with loop.store.reading() as c:
        dataset = datasets.get(c, record["dataset_id"])
    assert dataset is not None, "the step was recorded after its dataset"
    with training(loop, turn.should_stop) as is_our_turn:
        if not is_our_turn:
            return  # stopped while a fine-tuning job had the machine
        done = tracking.train(loop, cycle, dataset, parent=turn.version(cycle.parent), should_stop=turn.should_stop)
    result = {"run_id": done.run_id, "result": dict(done.result)}
    match done.status:
        case RunStatus.SUCCEEDED:
            assert done.version is not None, "a run that succeeded made a version"
            turn.enter(CycleState.CHECKING, {"version": done.version.number, **result})
        case RunStatus.NOTHING_TO_TRAIN:
            turn.enter(CycleState.NOTHING_TO_TRAIN, {"reason": "too few usable pairs to train on", **result})
        case RunStatus.USER_ERROR | RunStatus.SYSTEM_ERROR:
            turn.enter(CycleState.FAILED, _failure(cycle.state, str(done.status), _message(done.result)) | result)
        case RunStatus.RUNNING:
            return  # stopped; the next start goes on from the last checkpoint


def _check(turn: Turn) -> None:
    """The offline report; with ``gate.offline`` the whole verdict, otherwise the duel is opened where the guardrails pass."""
    loop, cycle = turn.loop, turn.cycle
    challenger, champion = turn.version(turn.recorded(CycleState.CHECKING)["version"]), turn.version(cycle.parent)
    with loop.store.reading() as c:
        now_champion = versions.alias(c, loop.name, Alias.CHAMPION)
        dataset = datasets.get(c, turn.recorded(CycleState.TRAINING)["dataset_id"])
        number = verdicts.duels_before(c, loop.name, cycle.number) + 1
        other = canaries.current(c, loop.name)
    if other is not None:
        return  # a canary that was begun by hand: the challenger waits for its end
    if now_champion != champion.number:
        reason = f"the champion became version {now_champion} while this cycle trained on version {champion.number}"
        _close(turn, challenger, CycleState.HELD, {"reason": reason})
        return
    report = evaluate.run(loop.store, loop.policy, loop.config, challenger=challenger, champion=champion, dataset=dataset)
    if report.errors and turn.should_stop():
        return  # an engine that was closed meanwhile says nothing about the challenger; the next start looks again
    now = datetime.now(UTC)
    is_anchored = loop.config.gate.seed_share > 0
    verdict = gate.decide(report, (), loop.config.gate, opened_at=now, now=now, seed_votes=() if is_anchored else None)
    record: dict[str, Any] = {"report": report.as_json()}
    if verdict.kind is VerdictKind.CONTINUE and loop.config.gate.offline:
        duel = evaluate.offline_duel(loop.store, loop.policy, loop.config, challenger=challenger, champion=champion)
        verdict = gate.decide(
            report,
            duel.picks,
            loop.config.gate,
            opened_at=now,
            now=now,
            more_to_come=False,
            duel_number=number,
            also=duel.problems(loop.config.gate.max_judge_flips),
        )
        record["offline_duel"] = duel.as_json()
    if verdict.kind is not VerdictKind.CONTINUE:
        _conclude(turn, challenger, champion, verdict, record, duel_id=None)
        return

    def record_duel(c: Connection, duel: Duel) -> None:
        turn.record(c, CycleState.DUELLING, {**record, "duel_id": duel.duel_id, "version": challenger.number})

    deploy.open_duel(
        loop.store,
        loop.policy,
        cycle_id=cycle.cycle_id,
        champion=champion,
        challenger=challenger,
        beside_base=is_anchored,
        also=record_duel,
    )


def _duel(turn: Turn) -> None:
    """One look at the duel. CONTINUE is written down once: evidence does not grow with the number of looks."""
    loop, cycle = turn.loop, turn.cycle
    record = turn.recorded(CycleState.DUELLING)
    with loop.store.reading() as c:
        duel = duels.get(c, record["duel_id"])
        now_champion = versions.alias(c, loop.name, Alias.CHAMPION)
        history = verdicts.for_cycle(c, cycle.cycle_id)
        assert duel is not None, "the step was recorded with its duel"
        verdict = standing(c, loop.config, duel, record["report"])
        told = base_record(c, loop.config, duel) if verdict.kind is not VerdictKind.CONTINUE else {}
        watched = deploy.duel_standing(c, loop.config, duel, datetime.now(UTC))
    looks.remember(loop.name, duel.duel_id, verdict)
    challenger, champion = turn.version(duel.challenger), turn.version(duel.champion)
    if duel.closed_at is not None or now_champion != duel.champion:
        _ended_by_hand(turn, challenger, now_champion)
        return
    if watched.broken is not None:
        reason = f"a live guard broke during the duel: {watched.broken}"
        _close(turn, challenger, CycleState.REJECTED, {"reason": reason, **deploy.evidence(watched)})
        return
    if verdict.kind is not VerdictKind.CONTINUE:
        _conclude(turn, challenger, champion, verdict, told, duel_id=duel.duel_id)
    elif not history:
        loop.store.write(lambda c: verdicts.insert(c, cycle.cycle_id, duel.duel_id, verdict, datetime.now(UTC)))


_STAGES: Mapping[CycleState, Callable[[Turn], None]] = {
    CycleState.BUILDING: _build,
    CycleState.TRAINING: _train,
    CycleState.CHECKING: _check,
    CycleState.DUELLING: _duel,
    CycleState.CANARY: canary.look,
}


# --- how a cycle ends


def _conclude(
    turn: Turn, challenger: Version, champion: Version, verdict: Verdict, record: Mapping[str, Any], *, duel_id: str | None
) -> None:
    """Promote or retire as the verdict says; alias, duel, verdict and last step in one transaction."""
    loop, cycle = turn.loop, turn.cycle
    state = _CLOSED_BY[verdict.kind]
    step = {"verdict": str(verdict.kind), "reason": verdict.text, "version": challenger.number, **record}

    def also(c: Connection) -> None:
        verdicts.insert(c, cycle.cycle_id, duel_id, verdict, datetime.now(UTC))
        turn.record(c, state, step)

    if state is CycleState.PROMOTED and loop.config.deploy.canary_share > 0:
        canary.begin(turn, challenger, champion, verdict, step, duel_id=duel_id)
    elif state is CycleState.PROMOTED:
        deploy.promote(
            loop.store,
            loop.policy,
            challenger,
            reason=verdict.text,
            replacing=champion.number,
            cycle_id=cycle.cycle_id,
            also=also,
        )
    else:
        _retire(turn, challenger, verdict.text, also)


def _ended_by_hand(turn: Turn, challenger: Version, now_champion: int | None) -> None:
    """A promotion or rollback by hand closed the duel before the gate did."""
    if now_champion == challenger.number:
        turn.enter(CycleState.PROMOTED, {"reason": "promoted by hand during the duel", "version": challenger.number})
        return
    reason = f"the duel was closed by hand; the champion is version {now_champion}"
    _close(turn, challenger, CycleState.HELD, {"reason": reason})


def _close(turn: Turn, challenger: Version, state: CycleState, record: Mapping[str, Any]) -> None:
    step, reason = {**record, "version": challenger.number}, str(record["reason"])

    def also(c: Connection) -> None:
        turn.record(c, state, step)
        events.guard_broken(c, challenger.policy, challenger.number, record, reason, datetime.now(UTC))

    _retire(turn, challenger, reason, also)


def _retire(turn: Turn, challenger: Version, reason: str, also: Callable[[Connection], None]) -> None:
    deploy.retire(turn.loop.store, turn.loop.policy, challenger, reason=reason, cycle_id=turn.cycle.cycle_id, also=also)


def _message(result: Mapping[str, Any]) -> str:
    error = result.get("error") or {}
    return str(error.get("message") or "the training process left no reason")


def _failure(state: CycleState, kind: str, error: str) -> dict[str, Any]:
    return {"stage": str(state), "error_kind": kind, "error": error, "reason": f"{state} failed: {error}"}


def _fail(turn: Turn, error: BaseException) -> None:
    """End the cycle as failed, with a duel or canary it opened. Its data stay usable: the next snapshot takes them again."""
    kind = RunStatus.USER_ERROR if isinstance(error, UserError) else RunStatus.SYSTEM_ERROR
    # What an error says that nobody foresaw may quote a message; one of ours, or of the disk, does not.
    text = str(error) if isinstance(error, PairloopError | OSError) else place_of(error)
    logger.error("cycle %d of %s failed while %s: %s", turn.cycle.number, turn.loop.name, turn.cycle.state, text)

    def commit(c: Connection) -> None:
        turn.record(c, CycleState.FAILED, _failure(turn.cycle.state, str(kind), text))
        now = datetime.now(UTC)
        deploy.end_duel(c, turn.loop.name, now)
        open_canary = canaries.current(c, turn.loop.name)
        if open_canary is not None and open_canary.cycle_id == turn.cycle.cycle_id:
            deploy.end_canary(c, turn.loop.name, "withdrawn", text, now)

    turn.loop.store.write(commit)
