"""bench: training, sampling and the whole loop beside their peers, in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pairloop.bench.trust import PARTS
from pairloop.cli.output import show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from collections.abc import Callable

    from pairloop.bench.settings import Mode, Settings

MODES: dict[str, tuple[Mode, ...]] = {"full": ("full",), "lora": ("lora",), "both": ("full", "lora")}

out_option = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-out"),
    show_default=True,
    help="Folder for bench.json, bench.md and bench.png, the random models and the logs.",
)
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where all contestants compute."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of each contestant."
)
quick_option = click.option(
    "--quick", is_flag=True, help="Fewer rounds, and the peer's best settings as once found, without a search."
)


def modes_option(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    choice = click.Choice(list(MODES))
    return click.option("--mode", type=choice, default=default, show_default=True, help="All weights, LoRA 16, or both.")


@click.group(cls=Verbs, invoke_without_command=True)
@modes_option("both")
@device_option
@threads_option
@quick_option
@out_option
@verb
@click.pass_context
def bench(context: click.Context, mode: str, device: str, threads: int, quick: bool, out: Path, as_json: bool) -> None:
    """Speed and memory beside the peers, in alternation on the same data, model and thread count.

    Without a subcommand all of them run, into one document; on CUDA without the loop. The peers come with
    `pip install 'pairloop[bench]'`. The first run writes random models into the folder; logs stay there.
    """
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
        if given:
            raise click.UsageError(f"give --{given[0].replace('as_', '')} behind the subcommand")
        return

    def measure(settings: Settings) -> dict[str, Any]:
        from pairloop.bench import looping, sampling, training

        found: dict[str, Any] = {"cells": training.bench(settings, MODES[mode]), "sampling": sampling.bench(settings)}
        return found | ({"loop": looping.bench(settings)} if device == "cpu" else {})

    _run(measure, cells=None, device=device, threads=threads, quick=quick, out=out, as_json=as_json)


@bench.command()
@click.option("--cells", help="Cells such as M6-S1,M6-S2; by default all of the device.")
@modes_option("full")
@device_option
@threads_option
@quick_option
@out_option
@verb
def train(cells: str | None, mode: str, device: str, threads: int, quick: bool, out: Path, as_json: bool) -> None:
    """DPO training beside TRL's DPOTrainer: as installed, and with its best settings as a search finds them."""

    def measure(settings: Settings) -> dict[str, Any]:
        from pairloop.bench import training

        return {"cells": training.bench(settings, MODES[mode])}

    _run(measure, cells=cells, device=device, threads=threads, quick=quick, out=out, as_json=as_json)


@bench.command()
@click.option("--cells", help="Cells such as M6-32,M6-512; by default all of the device.")
@device_option
@threads_option
@quick_option
@out_option
@verb
def sample(cells: str | None, device: str, threads: int, quick: bool, out: Path, as_json: bool) -> None:
    """Sampling beside transformers' generate and its continuous batching: two answers to every prompt."""

    def measure(settings: Settings) -> dict[str, Any]:
        from pairloop.bench import sampling

        return {"sampling": sampling.bench(settings)}

    _run(measure, cells=cells, device=device, threads=threads, quick=quick, out=out, as_json=as_json)


@bench.command()
@threads_option
@quick_option
@out_option
@verb
def loop(threads: int, quick: bool, out: Path, as_json: bool) -> None:
    """`pairloop demo` beside the script that a team would write: generate and DPOTrainer, four rounds of 512 pairs."""

    def measure(settings: Settings) -> dict[str, Any]:
        from pairloop.bench import looping

        return {"loop": looping.bench(settings)}

    _run(measure, cells=None, device="cpu", threads=threads, quick=quick, out=out, as_json=as_json)


@bench.command()
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    default=PARTS,
    show_default="all",
    help="What to measure; give it again for another part.",
)
@click.option("--duels", default=2_000, show_default=True, type=click.IntRange(100), help="Duels to simulate of each kind.")
@click.option("--seed", default=0, show_default=True, help="The same seed, the same duels.")
@click.option("--minutes", default=30.0, show_default=True, type=click.FloatRange(0.1), help="How long the soak takes.")
@click.option("--quick", is_flag=True, help="A smaller measure of everything but the duels.")
@out_option
@verb
def trust(parts: tuple[str, ...], duels: int, seed: int, minutes: float, quick: bool, out: Path, as_json: bool) -> None:
    """What is promised, measured part by part.

    gate: on simulated duels nothing worse passes, what is better does, and colluders change neither. picks: acknowledged a
    second, each on the disk before its 201, and none of them lost; needs a C compiler. kills: a server that is killed again and
    again loses no acknowledged pick. swap: versions change under load, and no request fails. loops: whole loops whose picks are
    coin tosses promote hardly anything. soak: everything at once for half an hour; no request fails, and it is told how much
    memory grows.
    """
    from pairloop.bench.report import machine
    from pairloop.bench.trust import TrustSettings, part
    from pairloop.cli.progress import TerminalWatcher

    found: dict[str, dict[str, Any]] = {}
    file = out / "trust.json"
    with TerminalWatcher() as watcher:
        settings = TrustSettings(out.resolve() / "trust", watcher.bar, duels, seed, quick, minutes)
        for name in PARTS:
            if name in parts:
                found[name] = part(name).measure(settings) | machine("cpu")
                _keep(file, name, found[name])
    tables = [table(part(name).headers, part(name).rows(figures)) for name, figures in found.items()]
    show(found | {"files": [file]}, "\n\n".join([*tables, f"written: {file}"]), as_json=as_json)


def _keep(file: Path, name: str, figures: dict[str, Any]) -> None:
    """Write a part's figures as soon as they are there, beside those of other parts that were measured before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(earlier | {name: figures}, indent=1) + "\n", encoding="utf-8")


@bench.command()
@click.option(
    "--requests",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Then send so many, half of them streams, and tell the server's memory after each tenth.",
)
@quick_option
@out_option
@verb
def gateway(requests: int, quick: bool, out: Path, as_json: bool) -> None:
    """What the server adds to a request, each group stored durably, beside a bare server that answers the same bytes."""
    from pairloop.bench import gateway as measured
    from pairloop.bench import gateway_report, report
    from pairloop.bench.settings import Settings
    from pairloop.cli.progress import TerminalWatcher

    with TerminalWatcher() as watcher:
        settings = Settings(out.resolve(), watcher.bar, quick=quick)
        found = report.document(settings, gateway=measured.bench(settings, soak=requests))
    file = out / "gateway.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join(table(headers, rows) for headers, rows in gateway_report.tables(found["gateway"]))
    show(found | {"files": [file]}, f"{text}\n\n{gateway_report.sentence(found['gateway'])}\nwritten: {file}", as_json=as_json)


def _run(
    measure: Callable[[Settings], dict[str, Any]],
    *,
    cells: str | None,
    device: str,
    threads: int,
    quick: bool,
    out: Path,
    as_json: bool,
) -> None:
    from pairloop.bench import report
    from pairloop.bench.settings import Settings, refuse_missing
    from pairloop.cli.progress import TerminalWatcher

    refuse_missing(device)
    with TerminalWatcher() as watcher:
        settings = Settings(out.resolve(), watcher.bar, cells, device, threads, quick)
        found = report.document(settings, **measure(settings))
    files = report.write(found, out)
    text = "\n\n".join(table(report.HEADERS[title], rows) for title, rows in report.tables(found).items())
    show(found | {"files": files}, f"{text}\n\nwritten: {', '.join(map(str, files))}", as_json=as_json)


COMMANDS = (bench,)


@bench.command()
@quick_option
@out_option
@verb
def pages(quick: bool, out: Path, as_json: bool) -> None:
    """How fast the pages answer and paint with 100,000 groups in the store; painting needs a Chromium and playwright."""
    from pairloop.bench import pages as measured
    from pairloop.bench import report
    from pairloop.bench.settings import Settings
    from pairloop.cli.progress import TerminalWatcher

    with TerminalWatcher() as watcher:
        settings = Settings(out.resolve(), watcher.bar, quick=quick)
        found = report.document(settings, pages=measured.bench(settings))
    file = out / "pages.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = f"{table(measured.HEADERS, measured.rows(found['pages']))}\n\n{measured.sentence(found['pages'])}"
    show(found | {"files": [file]}, f"{text}\nwritten: {file}", as_json=as_json)
