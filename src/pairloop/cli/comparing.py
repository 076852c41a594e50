"""lab compare: arms beside one another at equal rollouts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import emit, verb
from pairloop.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

QUICK_TASKS, QUICK_SEEDS = "sort", "0-1"


def _seeds(text: str) -> list[int]:
    """``0-2,7`` is 0, 1, 2, 7."""
    try:
        found = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += list(range(int(first), int(last or first) + 1))
    except ValueError as error:
        raise ConfigError(f"--seeds {text}: give numbers and ranges, such as 0-4 or 0,3,7") from error
    if not found:
        raise ConfigError(f"--seeds {text}: names no seed")
    return found


def _named(option: str, text: str, known: Iterable[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(f"{option}: unknown {', '.join(unknown) or 'name'}; there are {', '.join(known)}")
    return names


@click.command()
@click.option("--arms", default="standard", show_default=True, help="`standard`, `all`, or names separated by commas.")
@click.option("--tasks", help="`all`, or names separated by commas.  [default: all; with --quick sort]")
@click.option("--seeds", help="Training seeds, such as 0-4 or 0,3,7.  [default: 0-2; with --quick 0-1]")
@click.option("--rollouts", type=click.IntRange(64), default=4_096, show_default=True, help="Sampled completions per run.")
@click.option("--step", type=click.IntRange(16), default=64, show_default=True, help="Completions per optimizer step.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="AdamW's learning rate.  [default: the task's own]")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Runs at a time, one thread each.")
@click.option("--quick", is_flag=True, help="One small task and two seeds: minutes.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("lab-out"),
    show_default=True,
    help="Folder of runs.jsonl, the plots and the tasks' base models; runs found there are not repeated.",
)
@verb
def compare(
    arms: str,
    tasks: str | None,
    seeds: str | None,
    rollouts: int,
    step: int,
    lr: float | None,
    workers: int,
    quick: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Measures DPO at several refresh rates against GRPO and filtered imitation, at equal rollouts.

    Arms by tasks by seeds, each from the task's one base, all on the same prompts. A comparison that was interrupted goes on
    where it stopped: run the same command again.
    """
    from pairloop.cli.progress import TerminalWatcher
    from pairloop.lab import summary
    from pairloop.lab.arms import ARMS, STANDARD
    from pairloop.lab.compare import Job, compare, jobs_of
    from pairloop.lab.run import Budget
    from pairloop.lab.tasks import TASKS

    if step > rollouts:
        raise ConfigError(f"--step {step} is more than --rollouts {rollouts}: there would be no optimizer step")
    groups = {"standard": [arm.name for arm in STANDARD], "all": list(ARMS)}
    chosen = [ARMS[name] for name in groups.get(arms) or _named("--arms", arms, ARMS)]
    tasks = tasks or (QUICK_TASKS if quick else "all")
    names = list(TASKS) if tasks == "all" else _named("--tasks", tasks, TASKS)
    budget = Budget(rollouts=rollouts, completions_per_step=step, learning_rate=lr or 0.0)
    wanted: list[Job] = jobs_of(chosen, names, _seeds(seeds or (QUICK_SEEDS if quick else "0-2")), budget)
    with TerminalWatcher() as watcher:
        watcher.bar("bases and first runs", 0, len(wanted))
        rows = compare(
            wanted,
            out,
            out / "bases",
            workers=workers,
            report=lambda done, total, row: watcher.bar(f"last: {row['arm']} on {row['task']}", done, total),
        )
    document = summary.summarise(rows)
    document["files"] = [str(path) for path in summary.plot(document, out)]
    if as_json:
        emit(document)
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    for task in dict.fromkeys(entry["task"] for entry in document["arms"]):
        console.print(_table(task, [entry for entry in document["arms"] if entry["task"] == task]))
    console.print("plots: " + ", ".join(document["files"]), soft_wrap=True)


def _table(task: str, entries: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    from pairloop.statistics import percent

    found = Table(title=f"{task}: base {entries[0]['base_score']:.3f}, {len(entries[0]['score']['seeds'])} seeds")
    for header in (
        "arm",
        "score",
        "95 %",
        "greedy",
        "of GRPO-8's gain",
        "rollouts",
        "to 95 %",
        "ESS",
        "KL",
        "entropy",
        "length",
        "CPU s",
        "sample + train + evaluate",
    ):
        found.add_column(header, justify="left" if header == "arm" else "right")
    for entry in entries:
        interval, share, needed = entry["score"]["ci95"], entry.get("share_of_grpo_gain"), entry.get("rollouts_to_95")
        found.add_row(
            entry["arm"],
            f"{entry['score']['mean']:.3f}",
            f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "–",
            f"{entry['greedy']:.3f}",
            "–" if share is None else percent(share),
            str(entry["rollouts"]),
            "–" if needed is None else f"{needed:.0f}",
            f"{entry['ess_mean']:.2f}",
            f"{entry['kl_to_base']:.2f}",
            f"{entry['entropy']:.2f}",
            f"{entry['length']:.1f}",
            f"{entry['cpu_s']:.1f}",
            " + ".join(f"{entry['phases']['cpu_s'].get(phase, 0.0):.1f}" for phase in ("sample", "train", "evaluate")),
        )
    return found
