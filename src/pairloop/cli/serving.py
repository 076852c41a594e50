"""init, serve, worker, demo: what a team types on the first day."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from pairloop.cli.output import config_option, emit, show, table, verb


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", default="starter", show_default=True, help="starter, a Hugging Face model directory, or a hub id.")
@click.option("--name", default="support-bot", show_default=True, help="The policy's name: what clients send as `model`.")
@click.option("--force", is_flag=True, help="Write an existing pairloop.toml anew.")
@verb
def init(directory: Path, model: str, name: str, force: bool, as_json: bool) -> None:
    """Write a commented DIRECTORY/pairloop.toml; all state will live beside it."""
    from pairloop.config.train import RECIPE
    from pairloop.policy.engine import resolve_model
    from pairloop.scaffold import starter_recipe, write_config

    settings: dict[str, dict[str, Any]] = starter_recipe() if model == "starter" else {"train": dict(RECIPE)}
    if model not in ("starter", "fake"):
        local = Path(model).expanduser()
        if local.exists():
            resolve_model(str(local))
            model = str(local.resolve())
    settings["policy"] = {"name": name, "model": model, **settings.get("policy", {})}
    path = write_config(directory, settings, force=force)
    show(
        {"config": path, "model": model, "policy": name},
        f"wrote {path}\nnext: pairloop serve --config {path}",
        as_json=as_json,
    )


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="pairloop.toml, or the directory that holds it.  [default: the current directory; where it holds none, the defaults, "
    "with all state in pairloop-data]",
)
@click.option("--host", help="Address to listen on; loopback only as long as no keys exist.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option("--model", help="Serve this model instead of the configured one (`fake` needs no weights at all).")
@click.option("--no-scheduler", is_flag=True, help="API and page only; `pairloop worker` turns the loop.")
@verb
def serve(
    config_path: Path | None, host: str | None, port: int | None, model: str | None, no_scheduler: bool, as_json: bool
) -> None:
    """Serve the model, ask for picks, and turn the loop: API, web page and scheduler in one process."""
    from pairloop.telemetry import logs
    from pairloop.web.server import run

    config = _overridden(config_path, partial(logs.setup, background=True), host=host, port=port, model=model)
    run(config, turning=not no_scheduler, say=(lambda text: emit({"message": text})) if as_json else click.echo)


@click.command()
@config_option
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="Serve /metrics on this port; 0 is none.")
@verb
def worker(config_path: Path, metrics_port: int | None, as_json: bool) -> None:
    """Turn the loop without serving: for a server started with --no-scheduler on the same database and artifacts."""
    from pairloop.cli.working import work

    work(config_path, metrics_port, say=lambda message: show({"message": message}, message, as_json=as_json))


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for everything the demo makes.")
@click.option("--seed", default=0, show_default=True, help="Names the crowd, its cases and the training order.")
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(1, 50), help="Cycles to run.")
@click.option("--customers", default=512, show_default=True, type=click.IntRange(16), help="Customers who train, per round.")
@click.option(
    "--noise", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Share of picks that are a coin toss."
)
@click.option("--position-bias", default=0.0, show_default=True, help="Logits that customers add for the left answer.")
@click.option("--verifier", is_flag=True, help="No picks at all: a verifier labels the answers and judges the duel.")
@click.option("--control", is_flag=True, help="Add chosen-only fine-tuning on the same data and budget as a row.")
@verb
def demo(
    out: Path | None,
    seed: int,
    rounds: int,
    customers: int,
    noise: float,
    position_bias: float,
    verifier: bool,
    control: bool,
    as_json: bool,
) -> None:
    """Watch a served model get better from simulated picks: a real server, four cycles, a report."""
    from pairloop.cli.progress import TerminalWatcher
    from pairloop.demo.report import HEADERS, PAGE_FILE, table_rows
    from pairloop.demo.run import DemoOptions, free_folder, run_demo

    options = DemoOptions(
        out=free_folder(out),
        seed=seed,
        rounds=rounds,
        customers=customers,
        noise=noise,
        position_bias=position_bias,
        verifier=verifier,
        control=control,
    )
    with TerminalWatcher() as watcher:
        result = run_demo(options, watcher)
    lines = [table(HEADERS, table_rows(result)), ""]
    for example in result.examples:
        lines += [f"customer: {example.prompt}", f"  before: {example.before}", f"  after:  {example.after}"]
    lines += [
        "",
        f"{result.promotions} promotions in {len(result.rounds)} rounds; {result.wall_s:.0f} s, {result.cpu_s:.0f} CPU seconds",
        f"report: {options.out / PAGE_FILE}",
        f"go on:  {result.open_command}",
    ]
    show(result.as_json(), "\n".join(lines), as_json=as_json)


def _overridden(
    config_path: Path | None, begin_log: Callable[[Any], None], *, host: str | None, port: int | None, model: str | None
) -> Any:
    """The configuration with what the command line changes, checked as a whole."""
    from pairloop.config import CONFIG_FILE, load_config, override

    if config_path is None and Path(CONFIG_FILE).is_file():
        config_path = Path(CONFIG_FILE)  # as every other verb takes it: another store would seem to have lost everything
    changes: dict[str, dict[str, Any]] = {}
    for section, key, value in (("serve", "host", host), ("serve", "port", port), ("policy", "model", model)):
        if value is not None:
            changes.setdefault(section, {})[key] = value
    return override(load_config(config_path, begin_log=begin_log), changes)


COMMANDS = (init, serve, worker, demo)
