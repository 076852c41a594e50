"""cycle, evaluate, promote, rollback, canary, guards: the loop by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import config_option, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from pairloop.loop.cycle import CycleStatus
    from pairloop.types import Cycle


@click.group(cls=Verbs)
def cycle() -> None:
    """Run and look at cycles."""


@cycle.command("run")
@config_option
@verb
def cycle_run(config_path: Path, as_json: bool) -> None:
    """Begin a cycle, or go on with the open one; returns when it ended or duels."""
    from pairloop.cli.opening import actor, open_loop
    from pairloop.loop import cycle as stage

    with open_loop(config_path) as loop:
        done = stage.run(loop, trigger="by hand", actor=actor())
    show(_cycle_json(done), f"cycle {done.number}: {done.state}", as_json=as_json)


@cycle.command("status")
@config_option
@verb
def cycle_status(config_path: Path, as_json: bool) -> None:
    """Where the loop stands: the open cycle's stage and progress, the duel, what the next cycle waits for, and why the last
    round stopped, with its effective sample size and its KL to parent and base."""
    from pairloop.cli.opening import open_store
    from pairloop.loop import cycle as stage

    with open_store(config_path) as (config, store):
        status = stage.status(store, config)
    show(status.as_json(), _standing(status), as_json=as_json)


@cycle.command("cancel")
@config_option
@click.option("--reason", required=True, help="Kept with the cycle.")
@verb
def cycle_cancel(config_path: Path, reason: str, as_json: bool) -> None:
    """End the open cycle as held: its training or its duel stops, the champion stays, the picks stay usable."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.errors import NotFoundError
    from pairloop.loop import cycle as stage
    from pairloop.store import cycles

    with open_store(config_path) as (config, store):
        with store.reading() as c:
            current = cycles.current(c, config.policy.name)
        if current is None:
            raise NotFoundError(f"no cycle of {config.policy.name} is open; `pairloop cycle list` names those that were")
        ended = stage.cancel(store, current.cycle_id, reason=reason, actor=actor())
    show(_cycle_json(ended), f"cycle {ended.number}: {ended.state}", as_json=as_json)


@cycle.command("list")
@config_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Newest cycles to show.")
@verb
def cycle_list(config_path: Path, limit: int, as_json: bool) -> None:
    """Past cycles, newest first."""
    from pairloop.cli.opening import open_store
    from pairloop.store import cycles

    with open_store(config_path) as (config, store), store.reading() as c:
        found = cycles.list_(c, config.policy.name, limit=limit)
    rows = [(one.number, one.state, one.parent, one.trigger, f"{one.created_at:%Y-%m-%d %H:%M:%S}") for one in found]
    text = table(("cycle", "state", "parent", "trigger", "began (UTC)"), rows) if rows else "no cycle yet"
    show({"cycles": [_cycle_json(one) for one in found]}, text, as_json=as_json)


@click.command()
@config_option
@click.option("--version", "number", required=True, type=click.IntRange(0), help="The version to compare with the champion.")
@verb
def evaluate(config_path: Path, number: int, as_json: bool) -> None:
    """Print the offline report of a version against the champion."""
    from pairloop.cli.opening import open_loop
    from pairloop.errors import InvalidRequestError
    from pairloop.loop import evaluate as stage
    from pairloop.store import datasets, versions
    from pairloop.types import Alias

    with open_loop(config_path) as loop:
        name = loop.config.policy.name
        with loop.store.reading() as c:
            challenger = _known_version(versions.get(c, name, number), name, number)
            champion_number = versions.alias(c, name, Alias.CHAMPION) or 0
            if number == champion_number:
                raise InvalidRequestError(
                    f"{name}@{number} is the champion: name a version to compare with it", param="version"
                )
            champion = _known_version(versions.get(c, name, champion_number), name, champion_number)
            dataset = datasets.get(c, challenger.dataset_id) if challenger.dataset_id else None
        report = stage.run(loop.store, loop.policy, loop.config, challenger=challenger, champion=champion, dataset=dataset)
    document = report.as_json()
    rows = [(key, f"{m['mean']:.4g}", f"[{m['lo']:.4g}, {m['hi']:.4g}]", m["n"]) for key, m in document["metrics"].items()]
    failed = [f"{key}: {error}" for key, error in document["errors"].items()]
    text = "\n".join([table(("metric", "value", "95 % interval", "n"), rows), *failed, *document["notes"]])
    show(document, text, as_json=as_json)


@click.command()
@click.argument("number", metavar="VERSION", type=click.IntRange(0))
@config_option
@click.option("--reason", required=True, help="Kept with the promotion.")
@click.option(
    "--canary",
    "canary_share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Have it answer this share of the users first, and be promoted if no live guard breaks.",
)
@verb
def promote(number: int, config_path: Path, reason: str, canary_share: float | None, as_json: bool) -> None:
    """Make VERSION the champion by hand, past the gate."""
    from pairloop.cli.opening import actor, open_loop
    from pairloop.loop import deploy
    from pairloop.statistics import percent

    with open_loop(config_path) as loop:
        if canary_share is not None:
            canary = deploy.start_canary(
                loop.store, loop.policy, loop.config, number=number, share=canary_share, reason=reason, actor=actor()
            )
            show(canary, f"canary: version {number}, for {percent(canary.share)} of the users", as_json=as_json)
            return
        event = deploy.promote_by_hand(
            loop.store, loop.policy, loop.config.policy.name, number=number, reason=reason, actor=actor()
        )
    show(event, f"champion: version {number}", as_json=as_json)


@click.command()
@config_option
@click.option("--to", "number", type=click.IntRange(0), help="The version to go back to; the previous champion by default.")
@click.option("--reason", required=True, help="Kept with the rollback.")
@verb
def rollback(config_path: Path, number: int | None, reason: str, as_json: bool) -> None:
    """Make an earlier champion the champion again; the next cycle starts from it."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.loop import deploy

    with open_store(config_path) as (config, store):
        event = deploy.rollback(store, config.policy.name, to=number, reason=reason, actor=actor())
    show(event, f"champion: version {event.number} (was {event.previous})", as_json=as_json)


@click.command()
@config_option
@verb
def guards(config_path: Path, as_json: bool) -> None:
    """What the live guards say of the version under watch: the canary, the challenger in its duel, or the new champion."""
    from datetime import UTC, datetime

    from pairloop.cli.opening import open_store
    from pairloop.loop import deploy

    with open_store(config_path) as (config, store), store.reading() as c:
        found = deploy.standing(c, config, datetime.now(UTC))
    if found is None:
        show({"guards": None}, "no version is under watch", as_json=as_json)
        return
    said = {True: "fine", False: "BROKEN", None: "open"}
    rows = [(reason.rule, said[reason.passed], reason.text.partition(": ")[2]) for reason in found.reasons]
    head = f"version {found.version} beside version {found.former}: {found.answers} requests since {found.since:%Y-%m-%d %H:%M}"
    show({"guards": found.as_json()}, f"{head}\n{table(('guard', 'state', 'why'), rows)}", as_json=as_json)


@click.group(cls=Verbs)
def canary() -> None:
    """The version that answers a share of the users; `pairloop promote N --canary .1` starts one."""


@canary.command("stop")
@config_option
@click.option("--reason", required=True, help="Kept with the canary.")
@verb
def canary_stop(config_path: Path, reason: str, as_json: bool) -> None:
    """Withdraw the canary: the champion answers everybody again. A cycle that had promoted it ends as rejected."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.loop import deploy

    with open_store(config_path) as (config, store):
        ended = deploy.stop_canary(store, config.policy.name, reason=reason, actor=actor())
    show(ended, f"withdrawn: version {ended.version}; version {ended.champion} answers everybody", as_json=as_json)


def _known_version(version: Any, policy: str, number: int) -> Any:
    from pairloop.errors import NotFoundError

    if version is None:
        raise NotFoundError(f"{policy} has no version {number}; `pairloop versions` names them")
    return version


def _cycle_json(one: Cycle) -> dict[str, Any]:
    return {
        "cycle_id": one.cycle_id,
        "number": one.number,
        "policy": one.policy,
        "parent": one.parent,
        "trigger": one.trigger,
        "state": one.state,
        "created_at": one.created_at,
        "steps": one.steps,
    }


def _standing(status: CycleStatus) -> str:
    """The status for people: what is known, a line each; of duel and run what ``text`` says."""
    facts = {key: value for key, value in status.as_json().items() if value is not None and not isinstance(value, Mapping)}
    if status.last_verdict is not None:
        verdict = status.last_verdict.verdict
        facts["last_verdict"] = f"{verdict.kind} (cycle {status.last_verdict.cycle}): {verdict.text}"
    if status.last_round is not None:
        facts["last_round"] = status.last_round.text
    return "\n".join(f"{key}: {value}" for key, value in facts.items())


COMMANDS = (cycle, evaluate, promote, rollback, canary, guards)
