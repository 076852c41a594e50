"""Whether all is well, read at once: each thing that needs care as ok, warn or bad, in words, with what to do about it.

The thresholds are those of docs/prometheus-rules.yaml; ``runbook`` names the alarm there, and its line in docs/runbook.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from sqlalchemy import Connection

from pairloop.errors import StoreError
from pairloop.loop import deploy
from pairloop.policy.protocols import ReplicaState
from pairloop.store import counts, cycles, events, schedules
from pairloop.store.database import size_bytes
from pairloop.store.deliveries import DeliveryStatus
from pairloop.store.transfer import revision
from pairloop.types import CycleState
from pairloop.web.context import Context

State = Literal["ok", "warn", "bad"]

LEAST_FREE, TOO_FULL = 0.1, 0.03
OLD_BACKUP = timedelta(days=2)
KEY_SOON = timedelta(days=7)
SILENT = timedelta(minutes=1)
STUCK = timedelta(days=1)
WAITED_LONG = timedelta(hours=1)


class Check(NamedTuple):
    """One thing that was looked at; ``todo`` is empty where nothing is to be done."""

    name: str
    state: State
    text: str
    todo: str = ""
    runbook: str = ""


def checks(context: Context) -> list[Check]:
    """All of them; a store that cannot be read is one of the findings. Reads no artifact and no text: milliseconds."""
    found = [_server(context), *_engine(context), *_scheduler(context), _writer(context), *_disks(context)]
    try:
        with context.store.reading() as c:
            now = context.store.clock(c)
            found += [_schedule(context, c), _database(context, c), *_cycle(context, c, now), *_leases(c, now), _backup(c, now)]
            found += [*_keys(c, now), *_webhooks(context, c, now), _guards(context, c)]
    except StoreError as error:
        todo = "free the disk, end what locks the database, or bring its server back: nothing acknowledged is lost"
        found.append(Check("Store", "bad", f"it cannot be read: {error}", todo, "PairloopStoreUnreadable"))
    return found


def worst(found: list[Check]) -> State:
    return max((one.state for one in found), key=("ok", "warn", "bad").index, default="ok")


def size_words(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def age_words(age: timedelta) -> str:
    seconds = age.total_seconds()
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _server(context: Context) -> Check:
    if context.draining:
        return Check(
            "Server", "bad", "it is about to stop, and takes no new requests", "wait for the next one", "PairloopNotReady"
        )
    return Check("Server", "ok", "it takes requests")


def _engine(context: Context) -> Iterator[Check]:
    loaded = ", ".join(f"@{number}" for number in sorted(context.policy.loaded()))
    waiting = context.policy.queued()
    limit = context.config.serve.queue_limit
    state: State = "warn" if waiting > limit / 2 else "ok"
    yield Check(
        "Sampler",
        state,
        f"versions in memory: {loaded or 'none yet'}; {waiting} of {limit} requests wait or are sampled",
        "more engine servers, or a lower serve.exposure_rate" if state == "warn" else "",
        "PairloopFirstTokenSlow" if state == "warn" else "",
    )
    replicas = context.policy.replicas()
    ready = sum(one.state is ReplicaState.READY for one in replicas)
    for one in replicas:
        good = one.state is ReplicaState.READY
        logps = (
            "its log-probs are the trainer's" if one.recorded else "its log-probs are not the trainer's: pairs are scored anew"
        )
        yield Check(
            f"Engine {one.url}",
            "ok" if good else "warn" if ready else "bad",
            f"{one.state.value}, {one.outstanding} requests in flight; {logps if good else one.problem or 'no answer'}",
            "" if good else "start it, or look at its log: docs/engines.md",
            "" if good else "PairloopNotReady",
        )


def _scheduler(context: Context) -> Iterator[Check]:
    if context.scheduler is None:
        text = "this process does not turn the loop (--no-scheduler)"
        yield Check("Scheduler", "ok", text, "a `pairloop worker` must, on the same store", "PairloopNobodyTurnsTheLoop")
        return
    status = context.scheduler.status()
    if not status.get("running"):
        yield Check(
            "Scheduler", "bad", "its thread has ended", "start the server again; the log says why", "PairloopNobodyTurnsTheLoop"
        )
    elif status.get("error") is not None:
        todo = "what the error says; it is tried again by itself, at most an hour apart"
        yield Check("Scheduler", "bad", str(status["error"]), todo, "PairloopSchedulerTrouble")
    else:
        yield Check("Scheduler", "ok", "it turns the loop")


def _schedule(context: Context, c: Connection) -> Check:
    found = schedules.current(c, context.config)
    if found.unusable:
        todo = "set it anew or reset it on the page Schedule; until then the file's value holds"
        return Check("Schedule", "warn", "; ".join(found.unusable), todo)
    text = "cycles begin by themselves" if found.section.enabled else "paused: only what is asked for begins"
    return Check("Schedule", "ok", text)


def _writer(context: Context) -> Check:
    waiting, limit = context.store.waiting, context.config.store.max_waiting
    text = f"{waiting} writes wait; durability is {context.config.store.durability!r}"
    if context.store.is_busy:
        todo = "find out what else writes to that disk, or locks the database"
        return Check("Writes", "bad", f"{text}; new ones are refused", todo, "PairloopWritesRefused")
    if waiting > limit / 4:
        return Check("Writes", "warn", text, "a disk of its own for the database", "PairloopCommitSlow")
    return Check("Writes", "ok", text)


def _disks(context: Context) -> Iterator[Check]:
    config = context.config
    seen: dict[tuple[int, int], tuple[str, Path]] = {}
    for name, folder in (("state", config.state_dir), ("artifacts", config.artifacts_dir)):
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            continue
        seen.setdefault((usage.total, usage.free), (name, folder))
    for (total, free), (name, _) in seen.items():
        share = free / total if total else 0.0
        state: State = "ok" if share >= LEAST_FREE else "warn" if share >= TOO_FULL else "bad"
        text = f"{size_words(free)} of {size_words(total)} are free ({100 * share:.0f} %)"
        todo = "" if state == "ok" else "enlarge it, or remove old logs and backups; never artifacts by hand"
        yield Check(f"Disk of {name}", state, text, todo, "" if state == "ok" else "PairloopDiskLow")


def _database(context: Context, c: Connection) -> Check:
    size = size_bytes(c)
    words = "size unknown" if size is None else size_words(size)
    return Check("Store", "ok", f"{context.store.url.get_backend_name()}, {words}, schema revision {revision(c)}")


def _cycle(context: Context, c: Connection, now: datetime) -> Iterator[Check]:
    newest = next(iter(cycles.list_(c, context.policy_name, 1)), None)
    if newest is None:
        yield Check("Cycle", "ok", "none yet")
        return
    since = newest.steps[-1].created_at
    name, age = f"cycle {newest.number}", age_words(now - since)
    if newest.state is CycleState.FAILED:
        reason = str(newest.steps[-1].record.get("reason") or "no reason was recorded").partition("\n")[0]
        todo = "mend what it says; its picks are used by the next cycle"
        yield Check("Cycle", "warn", f"{name} failed {age} ago: {reason}", todo, "PairloopCycleFailed")
    elif not newest.state.is_terminal and now - since > STUCK:
        todo = "training: fewer epochs or a GPU; duelling: a larger serve.gate_share, or a smaller gate.max_hours"
        yield Check("Cycle", "warn", f"{name} has been {newest.state.value} for {age}", todo, "PairloopCycleSlow")
    else:
        yield Check("Cycle", "ok", f"{name} is {newest.state.value.replace('_', ' ')}, since {age}")
    beat = counts.oldest_run_beat(c, context.policy_name)
    if beat is not None and now - beat > SILENT:
        todo = "look at child.log of the run; a killed training goes on from its last checkpoint"
        yield Check("Training", "warn", f"it has been silent for {age_words(now - beat)}", todo, "PairloopWorkerSilent")


def _leases(c: Connection, now: datetime) -> Iterator[Check]:
    held = counts.held_leases(c)
    if not held:
        yield Check("Leases", "ok", "nobody holds one: nothing is being turned")
    for lease in held:
        name, left = f"Lease {lease.name}", lease.expires_at - now
        owner = lease.owner.partition("/")[0]
        if -left > SILENT:
            text = f"{owner} has been silent for {age_words(-left)}, and nobody took over"
            yield Check(name, "warn", text, "start a worker; a holder that comes back is fenced off", "PairloopLeaseStale")
        else:
            yield Check(name, "ok", f"held by {owner}, renewed in time")


def _backup(c: Connection, now: datetime) -> Check:
    taken_at = events.newest_at(c, events.BACKUP)
    todo = "`pairloop backup FOLDER --config DIR`, daily; `pairloop backups FOLDER` verifies them"
    if taken_at is None:
        return Check("Backup", "warn", "never one", todo, "PairloopBackupOld")
    text = f"the last one was made {age_words(now - taken_at)} ago; whether it is whole, `pairloop backups FOLDER` says"
    if now - taken_at > OLD_BACKUP:
        return Check("Backup", "warn", text, todo, "PairloopBackupOld")
    return Check("Backup", "ok", text)


def _keys(c: Connection, now: datetime) -> Iterator[Check]:
    expires_at = counts.soonest_key_expiry(c, now)
    if expires_at is not None and expires_at - now < KEY_SOON:
        text = f"the next one runs out in {age_words(expires_at - now)}"
        yield Check("Keys", "warn", text, "make a new one, give it out, revoke the old one", "PairloopKeyExpires")


def _webhooks(context: Context, c: Connection, now: datetime) -> Iterator[Check]:
    told = {(one.endpoint, one.status): one for one in counts.deliveries(c, context.policy_name)}
    for endpoint in context.config.webhooks.endpoints:
        failed = told.get((endpoint.name, DeliveryStatus.FAILED.value))
        pending = told.get((endpoint.name, DeliveryStatus.PENDING.value))
        late = pending is not None and now - pending.oldest_at > WAITED_LONG
        text = f"{0 if pending is None else pending.number} wait, {0 if failed is None else failed.number} were given up"
        todo = "mend the receiver, `pairloop webhooks test NAME`, then `pairloop webhooks redeliver`"
        bad = late or failed is not None
        state: State = "warn" if bad else "ok"
        yield Check(f"Webhook {endpoint.name}", state, text, todo if bad else "", "PairloopWebhookFailing" if bad else "")


def _guards(context: Context, c: Connection) -> Check:
    found = deploy.standing(c, context.config, datetime.now(UTC))
    if found is None:
        return Check("Live guards", "ok", "no version is under watch")
    text = f"version {found.version} is watched beside {found.former}, {found.answers} answers so far"
    if found.broken is not None:
        todo = "it is taken out of traffic by itself, unless deploy says otherwise: `pairloop guards`"
        return Check("Live guards", "bad", f"{text}; broken: {found.broken}", todo, "PairloopRolledBack")
    return Check("Live guards", "ok", text)
