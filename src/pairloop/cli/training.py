"""train: a one-off run on a file, or the training stage of the loop by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import show, table, verb

if TYPE_CHECKING:
    from pairloop.config import Config


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Dataset rows (JSONL or JSON array)."
)
@click.option(
    "--validation",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Rows to measure on, instead of a share of --data.",
)
@click.option("--model", help="starter, a Hugging Face model directory, or a hub id.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the trained model.")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="pairloop.toml: its [train], [pairs] and [policy]."
)
@click.option("--dataset", "dataset_id", help="Without --data: train the champion on this dataset and register the version.")
@click.option("--family", help="The rows' family, where the file does not show it.")
@click.option("--method", type=click.Choice(["full", "lora"]), help="All weights, or a LoRA adapter.")
@click.option("--objective", metavar="NAME", help="dpo, sft, grpo, or another one of docs/config.md.")
@click.option("--beta", type=float, help="DPO's beta.")
@click.option("--nll-weight", type=float, help="Weight of the chosen answers' mean negative log-likelihood.")
@click.option("--label-smoothing", type=float, help="Share of pairs expected to be labelled the wrong way round.")
@click.option("--learning-rate", type=float, help="Peak learning rate of AdamW.")
@click.option("--learning-rate-multiplier", type=float, help="Times the configured learning rate.")
@click.option("--batch-size", type=int, help="Rows per optimizer step.")
@click.option("--epochs", type=int, help="Passes over the rows.")
@click.option("--max-length", type=int, help="Longest prompt plus completion in tokens; longer rows are refused and counted.")
@click.option("--heldout-share", type=float, help="Share of prompts held out.")
@click.option("--train-seed", "seed", type=int, help="Names the order of the rows.")
@click.option("--launcher", type=click.Choice(["local", "torchrun", "ray"]), help="What starts the training processes.")
@click.option("--processes", type=int, help="Training processes, with torchrun or Ray.")
@click.option("--skip-refused", is_flag=True, help="Train on the good rows of a file that also has bad ones.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run into the same --out, from its last checkpoint.")
@verb
def train(
    data: Path | None,
    validation: Path | None,
    model: str | None,
    out: Path | None,
    config_path: Path | None,
    dataset_id: str | None,
    family: str | None,
    skip_refused: bool,
    resume: bool,
    as_json: bool,
    **overrides: Any,
) -> None:
    """One training run, on pairs, scored groups or demonstrations, as the objective has it.

    `pairloop train --data FILE --model DIR --out DIR` stands alone: no server, no database.
    `pairloop train --config DIR --dataset ID` runs the loop's training stage on a snapshot.
    """
    if data is None:
        if model or out or family or validation or skip_refused or resume:
            raise click.UsageError("--model, --out, --family, --validation, --skip-refused and --resume go with --data FILE")
        _train_stage(_configured(config_path or Path("."), overrides), dataset_id, as_json=as_json)
        return
    if out is None or dataset_id is not None:
        raise click.UsageError("--data FILE needs --out DIR, where the trained model goes, and no --dataset")
    config = _configured(config_path, overrides)
    wanted = _OneOff(data, validation, model or config.policy.model, out, family, skip_refused=skip_refused, resume=resume)
    _train_file(config, wanted, as_json=as_json)


def _configured(path: Path | None, overrides: dict[str, Any]) -> Config:
    """The configuration with the command line's settings; options that its objective does not read are left out."""
    from pairloop.config import load_config, override
    from pairloop.loop.train import with_objective

    config = load_config(path)
    given = {key: value for key, value in overrides.items() if value is not None}
    if "objective" in given:
        config = config.model_copy(update={"train": with_objective(config.train, given["objective"])})
    if (multiplier := given.pop("learning_rate_multiplier", None)) is not None:
        given["learning_rate"] = given.get("learning_rate", config.train.learning_rate) * multiplier
    sections: dict[str, dict[str, Any]] = {"train": {}, "policy": {}, "pairs": {}}
    for key, value in given.items():
        sections[{"method": "policy", "heldout_share": "pairs"}.get(key, "train")][key] = value
    return override(config, sections)


@dataclass(frozen=True)
class _OneOff:
    """A run on a file, as it was asked for."""

    data: Path
    validation: Path | None
    model: str
    out: Path
    family: str | None
    skip_refused: bool
    resume: bool


def _train_file(config: Config, wanted: _OneOff, *, as_json: bool) -> None:
    from pairloop.cli.progress import TerminalWatcher
    from pairloop.loop.pairs import compile_file
    from pairloop.loop.train import train_file
    from pairloop.store import new_id
    from pairloop.track import reporting, training_info

    objective = config.train.objective
    options: dict[str, Any] = {"family": wanted.family, "skip_refused": wanted.skip_refused}
    read, compiled = compile_file(wanted.data, config, objective, split_prompts=wanted.validation is None, **options)
    heldout = compiled.heldout
    if wanted.validation is not None:
        heldout = compile_file(wanted.validation, config, objective, **options)[1].train
    facts = {"data": wanted.data.name, "data_sha256": _sha256(wanted.data), "model": wanted.model}
    info = training_info(config, key=new_id("run"), name=wanted.out.name, **facts)
    with TerminalWatcher() as watcher, reporting(config, info) as report:

        def heard(row: Mapping[str, Any]) -> None:
            watcher.bar(f"training on {wanted.data.name}", int(row["step"]), int(row["of"]))
            report.row(row)

        result = train_file(
            compiled.train,
            wanted.model,
            wanted.out,
            config,
            heldout=heldout,
            resume=wanted.resume,
            on_progress=heard,
        )
        report.trained(result.as_dict(), status=str(result.status))
    document = {
        "rows": read.rows,
        "refused": read.refused,
        "pairs": {"train": len(compiled.train), "heldout": len(heldout)},
        "dropped": compiled.dropped,
        "out": wanted.out,
        "result": result,
    }
    show(document, _result_text(document, result), as_json=as_json)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _train_stage(config: Config, dataset_id: str | None, *, as_json: bool) -> None:
    from pairloop.cli.opening import owner
    from pairloop.cli.progress import TerminalWatcher
    from pairloop.errors import NotFoundError
    from pairloop.loop import train as stage
    from pairloop.store import Store, datasets, new_id, versions
    from pairloop.track import reporting, training_info
    from pairloop.types import Alias

    with Store.open(config) as store, TerminalWatcher() as watcher:
        name = config.policy.name
        with store.reading() as c:
            dataset = datasets.get(c, dataset_id) if dataset_id else next(iter(datasets.list_(c, name)), None)
            parent = versions.get(c, name, versions.alias(c, name, Alias.CHAMPION) or 0)
        if dataset is None or parent is None:
            raise NotFoundError(f"{name} has no such dataset or no champion yet; `pairloop pairs build` makes a dataset")
        info = training_info(config, key=new_id("run"), name=f"{name} by hand", dataset=dataset.dataset_id, parent=parent.name)
        with reporting(config, info) as report:

            def heard(row: Mapping[str, Any]) -> None:
                watcher.bar("training", int(row["step"]), int(row["of"]))
                report.row(row)

            record = stage.run(store, config, dataset=dataset, parent=parent, cycle_id=None, owner=owner(), on_progress=heard)
            made = record.version.name if record.version else None
            report.trained(record.result, status=str(record.status), version=made)
    text = f"version {record.version.number}" if record.version else "no version"
    show(record, f"{record.status}: {text}", as_json=as_json)


def _result_text(document: dict[str, Any], result: Any) -> str:
    counts = document["pairs"]
    head = (
        f"{document['rows']} rows: {counts['train']} to train on, {counts['heldout']} held out\n"
        f"{result.status}: {result.steps} steps; model in {document['out']}\n"
        f"stopped because: {result.stopped_because or '–'} ({result.stop_message or 'no reason was left'})"
    )
    reasons = {**document["refused"], **document["dropped"], **result.dropped}
    lines = [head, *result.warnings]
    if reasons:
        lines.append(table(("not used because", "count"), list(reasons.items())))
    if result.heldout_after:
        after = result.heldout_after
        rows = [(key, f"{before:.4g}", f"{after[key]:.4g}") for key, before in result.heldout_before.items() if key in after]
        lines.append(table(("held out", "before", "after"), rows))
    return "\n".join(lines)


COMMANDS = (train,)
