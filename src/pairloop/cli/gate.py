"""gate: why a version was or was not promoted, and how many picks the next duel will take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import config_option, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from pairloop.config import GateSection
    from pairloop.loop.gate import Plan
    from pairloop.types import Cycle, Verdict

POWER_AT = (50, 100, 200, 400, 600, 1_000, 1_400, 2_000, 4_000)
_MARKS = {True: "pass", False: "fail", None: "open"}


@click.group(cls=Verbs)
def gate() -> None:
    """Look at verdicts, and plan duels."""


@gate.command("explain")
@config_option
@click.option("--cycle", "number", type=click.IntRange(1), help="The cycle's number; the newest one by default.")
@verb
def gate_explain(config_path: Path, number: int | None, as_json: bool) -> None:
    """Say in words and numbers why a cycle ended as it did, or what an open duel still lacks."""
    from pairloop.cli.opening import open_store
    from pairloop.errors import NotFoundError
    from pairloop.loop.cycle import last_word
    from pairloop.store import cycles

    with open_store(config_path) as (config, store), store.reading() as c:
        found = [one for one in cycles.list_(c, config.policy.name, limit=10_000) if number in (None, one.number)]
        if not found:
            if number is None:
                text = f"no cycle yet of {config.policy.name}: `pairloop cycle status` says what the first one waits for"
                raise NotFoundError(text)
            raise NotFoundError(f"no cycle {number} of {config.policy.name}; `pairloop cycle list` names them")
        verdict = last_word(c, config, found[0])[1]
    show(
        {"cycle": found[0].number, "state": found[0].state, "verdict": verdict},
        _explanation(found[0], verdict),
        as_json=as_json,
    )


@gate.command("plan")
@click.option(
    "--win", "win_rate", required=True, type=click.FloatRange(0, 1), help="How often the challenger is really better."
)
@click.option(
    "--flip", default=0.0, type=click.FloatRange(0, 0.5), help="Share of picks that say the opposite of what was meant."
)
@click.option("--colluders", default=0.0, type=click.FloatRange(0, 1), help="Share of raters who always pick the challenger.")
@click.option("--taste", default=0.0, type=click.FloatRange(0, 1), help="Correlation of two picks of one rater.")
@click.option("--picks-per-rater", default=1, show_default=True, type=click.IntRange(1), help="Picks of each rater, one a day.")
@click.option("--robust", type=click.FloatRange(0, 0.5, max_open=True), help="Instead of gate.robust.")
@click.option("--cluster", type=click.Choice(["pick", "rater_day", "rater"]), help="Instead of gate.cluster.")
@click.option("--duels", default=2_000, show_default=True, type=click.IntRange(100), help="Duels to simulate.")
@click.option(
    "--picks", default=4_000, show_default=True, type=click.IntRange(50), help="Picks after which a simulated duel ends."
)
@click.option("--seed", default=0, show_default=True, help="The same seed, the same figures.")
@config_option
@verb
def gate_plan(
    win_rate: float,
    flip: float,
    colluders: float,
    taste: float,
    picks_per_rater: int,
    robust: float | None,
    cluster: str | None,
    duels: int,
    picks: int,
    seed: int,
    config_path: Path,
    as_json: bool,
) -> None:
    """How many picks a duel will take: the gate's own count on simulated raters, looked at after every pick.

    With the settings of the [gate] table where there is a pairloop.toml, else the default ones.
    """
    from pairloop.cli.progress import TerminalWatcher
    from pairloop.loop import gate as stage

    section = _section(config_path, robust=robust, cluster=cluster)
    crowd = stage.Crowd(win_rate, flips=flip, colluders=colluders, picks_per_rater=picks_per_rater, taste=taste)
    at = [n for n in POWER_AT if n <= picks]
    with TerminalWatcher() as watcher:
        made = stage.plan(crowd, section, at=at, duels=duels, picks=picks, seed=seed, on_step=watcher.bar)
    settings = {name: getattr(section, name) for name in ("alpha", "min_picks", "min_raters", "max_picks", "cluster", "robust")}
    show({**made.as_json(), "seed": seed, "gate": settings}, _plan_text(made, section), as_json=as_json)


def _section(config_path: Path, **given: Any) -> GateSection:
    """The gate's settings with what the command line says; the default ones where no file is named and none is here."""
    from pairloop.config import CONFIG_FILE, Config, load_config, override

    is_default = config_path == Path(".") and not (config_path / CONFIG_FILE).is_file()
    config = Config() if is_default else load_config(config_path)
    return override(config, {"gate": {name: value for name, value in given.items() if value is not None}}).gate


def _plan_text(made: Plan, section: GateSection) -> str:
    from pairloop.statistics import percent

    def told(picks: int | None) -> str:
        return f"more than {made.picks:,}" if picks is None else f"{picks:,}"

    rows = [(f"{n:,}", percent(share.mean, 1), f"{percent(share.lo, 1)} to {percent(share.hi, 1)}") for n, share in made.power]
    text = f"{told(made.median)} picks in the median, {told(made.p90)} at 90 % ({made.duels:,} simulated duels)"
    over = [name for name, picks in (("median", made.median), ("90 %", made.p90)) if picks is None or picks > section.max_picks]
    if over:
        text += f"; a duel ends undecided at gate.max_picks = {section.max_picks:,}, before the {' and the '.join(over)}"
    return f"{text}\n{table(('by picks', 'promoted', '95 % interval'), rows)}"


def _explanation(one: Cycle, verdict: Verdict | None) -> str:
    if verdict is None:
        reason = one.steps[-1].record.get("reason", "")
        return f"cycle {one.number} is {one.state}; no verdict was needed. {reason}".rstrip()
    rows = [(_MARKS[reason.passed], reason.rule, reason.text) for reason in verdict.reasons]
    head = (
        f"cycle {one.number}: {verdict.kind}. The challenger won {verdict.wins} and lost {verdict.losses} decisive picks "
        f"({verdict.ties} ties) of {verdict.raters} raters; e-value {verdict.e_value:.3g}."
    )
    return f"{head}\n{_because(verdict)}\n\n{table(('', 'rule', 'why'), rows)}\n\n{_meanings(verdict)}".rstrip()


def _meanings(verdict: Verdict) -> str:
    """What the rules mean that did not pass."""
    from pairloop.loop.gate import RULES

    missed = dict.fromkeys(reason.rule for reason in verdict.reasons if reason.passed is not True)
    return "\n".join(f"{rule}: {RULES[rule].meaning}" for rule in missed if rule in RULES)


def _because(verdict: Verdict) -> str:
    """The rules that settled it, in one sentence."""
    from pairloop.types import VerdictKind

    failed = [reason.rule for reason in verdict.reasons if reason.passed is False]
    missing = [reason.rule for reason in verdict.reasons if reason.passed is None]
    match verdict.kind:
        case VerdictKind.PROMOTE:
            return "Promoted, for the duel was won and every rule passed."
        case VerdictKind.REJECT:
            return f"Rejected, for what failed: {', '.join(failed)}."
        case VerdictKind.HOLD:
            stopped = f"Held: the champion stays. Stopped by {', '.join(failed)}" if failed else "Held: the champion stays"
            return f"{stopped}; not shown: {', '.join(missing)}." if missing else f"{stopped}."
        case VerdictKind.CONTINUE:
            return f"Undecided: more picks are needed for {', '.join(missing)}."


COMMANDS = (gate,)
