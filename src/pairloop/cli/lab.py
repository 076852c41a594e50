"""lab: the mathematics checked and the claim measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import EXIT_SYSTEM_FAILURE, emit, plain, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_MODELS = ("tiny", "starter")


@click.group(cls=Verbs)
def lab() -> None:
    """The laboratory: is a recurring DPO pipeline as good as RL? Checked to machine precision, and measured."""


@lab.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=DEFAULT_MODELS,
    show_default=True,
    help="tiny (a random Llama), starter, or a Hugging Face model directory; may be given again.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Names the random weights, prompts and completions.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for equivalence.json and the plots (PNG)."
)
@verb
def equivalence(models: tuple[str, ...], seed: int, out: Path | None, as_json: bool) -> None:
    """Checks in float64 which losses are one loss at the reference, and how that decays with drift.

    The gradient table of DPO against the group family on real transformers, the expectations by enumeration and simulation, the
    Taylor steps of the derivation with what each of them drops, and the drift. Exit code 1 where a claim does not hold.
    """
    from pairloop.cli.progress import TerminalWatcher
    from pairloop.lab import equivalence as room

    with TerminalWatcher() as watcher:
        document = room.equivalence(models, seed=seed, on_step=watcher.bar)
    if out is not None:
        document |= {"files": [_write(document, out / "equivalence.json"), *room.plot(document, out)]}
    if as_json:
        emit(document)
    else:
        _print(document)
    if not document["holds"]:
        raise SystemExit(EXIT_SYSTEM_FAILURE)


def _write(document: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console

    from pairloop.lab.drift import summarise
    from pairloop.lab.equivalence import claims_of

    # A pipe has no width: wide enough for every column there.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    for model in dict.fromkeys(row["model"] for row in document["rows"]):
        console.print(_gradients(model, [row for row in document["rows"] if row["model"] == model]))
    console.print(_expectations(document["expectations"]))
    console.print(_taylor_steps(document["taylor"]))
    console.print(_drift_by_kl(summarise(document["drift"])))
    claims = claims_of(document)
    console.print(f"{sum(row['holds'] for row in claims)} of {len(claims)} claims hold")
    for path in document.get("files", ()):
        console.print(f"written: {path}")


def _gradients(model: str, rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("left", "right", "lengths", "1 - cosine", "|left| / |right|", "claimed", "error", "")
    table = _table(f"{model}: gradients at policy = reference = sampler, float64", columns)
    for row in rows:
        names = (row["dpo"], row["grpo"], row["lengths"])
        if row["expected_ratio"] is None:
            claim = ("cosine below 1", "")
        else:
            claim = (f"{row['expected_ratio']:.6g}", f"{row['ratio_error']:.0e}")
        table.add_row(*names, f"{row['cosine_distance']:.1e}", f"{row['ratio']:.6g}", *claim, _mark(row))
    return table


def _expectations(rows: Sequence[dict[str, Any]]) -> Table:
    from rich.markup import escape

    table = _table("expectations: exact by enumeration (R2), simulated (R3)", ("", "name", "expected", "value", "error", ""))
    for row in rows:
        figures = (f"{row['expected']:.4f}", f"{row['value']:.4f}", f"{row['relative_error']:.1e}")
        table.add_row(row["claim"], escape(row["name"]), *figures, _mark(row))
    return table


def _taylor_steps(rows: Sequence[dict[str, Any]]) -> Table:
    drifts = [f"rms h {point['aim']:g}" for point in rows[0]["points"]] if rows else []
    table = _table("Taylor steps: dropped gradient, as a share of the gradient", ("model", "step", "order", *drifts, ""))
    for row in rows:
        measured = row["measured_order"]
        order = "" if measured is None else f"{measured['gradient_dropped']:.2f} ({row['order'] - 1})"
        shares = [f"{point['gradient_dropped']:.1e}" for point in row["points"]]
        table.add_row(row["model"], row["step"], order, *shares, _mark(row))
    return table


def _drift_by_kl(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("KL(policy || sampler)", "nets", "ESS", "cosine, mean", "lowest", "highest")
    table = _table("drift: gradient of DPO on frozen pairs against the true policy gradient, exact", columns)
    for row in rows:
        ess, cosine = row["ess"], row["cosine"]
        means = (f"{ess['mean']:.2f}", f"{cosine['mean']:.2f}", f"{cosine['low']:.2f}", f"{cosine['high']:.2f}")
        table.add_row(f"{row['kl']:.2f}", str(row["n"]), *means)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, no_wrap=True), box=SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(Text(column))
    return table


def _mark(row: dict[str, Any]) -> str:
    return "[green]holds[/]" if row["holds"] else "[bold red]FAILS[/]"


@lab.command()
@click.argument("claim_id", metavar="CLAIM")
@click.option("--seed", type=int, default=0, show_default=True, help="Names every random number of the measurement.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the results file, CLAIM.json.")
@verb
def claim(claim_id: str, seed: int, out: Path | None, as_json: bool) -> None:
    """Measures one claim (R1 to R13) and judges it by its threshold.

    `pairloop lab claim R10 --out docs/results` keeps the figures for `pairloop lab report`. Exit code 1 where the claim failed.
    """
    from pairloop.cli.progress import TerminalWatcher
    from pairloop.errors import NotFoundError
    from pairloop.lab.claims import CLAIMS, Settings
    from pairloop.lab.claims import results as room

    wanted = CLAIMS.get(claim_id.upper())
    if wanted is None:
        raise NotFoundError(f"no claim {claim_id}: there are {', '.join(CLAIMS)}")
    with TerminalWatcher() as watcher:
        measurement = room.measure(wanted, Settings(seed, watcher.bar))
    outcome = room.judged(wanted, measurement)
    if out is not None:
        room.write(measurement, wanted, out)
    text = f"{wanted.id} {outcome.word}: {outcome.result}\nthreshold: {wanted.threshold}\n\n{outcome.details}"
    show({**asdict(measurement), "passed": outcome.passed, "result": outcome.result}, text, as_json=as_json)
    if outcome.passed is False:
        raise SystemExit(EXIT_SYSTEM_FAILURE)


@lab.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("docs/results"),
    show_default=True,
    help="Folder of the results files.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("docs/science.md"),
    show_default=True,
    help="The page; its plots go into the folder of the same name beside it.",
)
@verb
def report(results: Path, out: Path, as_json: bool) -> None:
    """Writes the page of all claims from the results files: threshold, command, result, pass or fail, plots."""
    from pairloop.lab import report as room

    found = room.write(results, out)
    rows = [(finding.claim.id, finding.status, finding.claim.title) for finding in found]
    document = {"out": out, "claims": [finding.as_json() for finding in found]}
    show(document, f"{table(('', '', 'claim'), rows)}\nwritten: {out}", as_json=as_json)


COMMANDS = (lab,)
