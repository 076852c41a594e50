"""data, pairs: rows in and out, and why a row was not used."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import EXIT_USER_ERROR, config_option, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from pairloop.config import Config
    from pairloop.formats import CheckResult
    from pairloop.redaction import Redactor
    from pairloop.store import Store
    from pairloop.types import Dataset, LabelledGroup

IMPORT_BATCH = 256
"""Groups per transaction."""

_file = click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
_family = click.option("--family", help="The rows' family, where the file does not show it.")


@click.group(cls=Verbs)
def data() -> None:
    """Bring preference rows in, take them out, count them."""


@data.command("import")
@_file
@config_option
@_family
@click.option("--skip-refused", is_flag=True, help="Import the good rows of a file that also has bad ones.")
@verb
def data_import(file: Path, config_path: Path, family: str | None, skip_refused: bool, as_json: bool) -> None:
    """Put a file's rows into the store; the next cycle's pairs hold them. Importing a file again changes nothing.

    Rows of every family are read, feedback exports of Open WebUI and stored completions of the OpenAI API included.
    """
    from pairloop.cli.opening import open_store
    from pairloop.formats import check_rows, each_group

    with open_store(config_path) as (config, store):
        limit = config.pairs.max_chars
        check = check_rows(file, family=family, max_chars=limit)
        if not skip_refused:
            check.or_raise()
        found = each_group(file, family=family, max_chars=limit, policy=config.policy.name)
        if store.redactor is not None and config.privacy.redact_files:
            found = map(partial(_redacted, store.redactor), found)
        new = sum(store.write(partial(_insert_all, batch)) for batch in _batches(found))
    document = {"rows": check.rows, "imported": new, "known": check.kept - new, "refused": check.refused}
    text = f"{check.rows} rows: {new} imported, {check.kept - new} known already"
    show(document, _with_reasons(text, check.refused), as_json=as_json)


@data.command("check")
@_file
@_family
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="pairloop.toml: its limits.")
@click.option("--model", help="A model: also refuse what its chat template does, and what is longer than train.max_length.")
@verb
def data_check(file: Path, family: str | None, config_path: Path | None, model: str | None, as_json: bool) -> None:
    """Validate a file and name every bad row: line, JSON path, reason. Exit code 2 where there is one."""
    from pairloop.config import load_config
    from pairloop.formats import check_rows
    from pairloop.policy.engine import resolve_model
    from pairloop.template import ChatTemplate

    config = load_config(config_path)
    tokens = ChatTemplate.load(resolve_model(model)) if model is not None else None
    limits = {"max_chars": config.pairs.max_chars, "max_length": config.train.max_length}
    check = check_rows(file, family=family, tokens=tokens, **limits)
    show({"file": file, **_checked(check)}, _check_text(check), as_json=as_json)
    if check.problems:
        sys.exit(EXIT_USER_ERROR)


def _checked(check: CheckResult) -> dict[str, Any]:
    return {
        "family": check.family,
        "rows": check.rows,
        "kept": check.kept,
        "refused": check.refused,
        "problems": check.problems,
        "counts": check.counts,
    }


def _check_text(check: CheckResult) -> str:
    head = f"{check.rows} rows of family {check.family}: {check.kept} good, {check.rows - check.kept} refused"
    return "\n".join([*map(str, check.problems), _with_reasons(head, check.refused)])


def _batches(found: Iterable[LabelledGroup]) -> Iterator[Sequence[LabelledGroup]]:
    """Short transactions, so that a server beside this import goes on answering."""
    waiting = iter(found)
    while batch := list(islice(waiting, IMPORT_BATCH)):
        yield batch


def _redacted(redactor: Redactor, labelled: LabelledGroup) -> LabelledGroup:
    rows = tuple(redactor.feedback(row) for row in labelled.feedback)
    return replace(labelled, group=redactor.group(labelled.group), feedback=rows)


def _insert_all(batch: Sequence[LabelledGroup], c: Connection) -> int:
    return sum(_insert(c, labelled) for labelled in batch)


def _insert(c: Connection, labelled: LabelledGroup) -> bool:
    from pairloop.store import feedback, groups

    if groups.get(c, labelled.group.group_id) is not None:
        return False
    groups.insert(c, labelled.group)
    for row in labelled.feedback:
        feedback.insert(c, row)
    return True


@data.command("export")
@config_option
@click.option("--dataset", "dataset_id", help="The dataset; the newest one by default.")
@click.option(
    "--format", "format_name", default="openai", show_default=True, help="A row family, or the trainer that is to read them."
)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write.")
@click.option("--skip-refused", is_flag=True, help="Leave out what the format cannot hold, and count it.")
@verb
def data_export(
    config_path: Path, dataset_id: str | None, format_name: str, out: Path, skip_refused: bool, as_json: bool
) -> None:
    """Write a dataset's training rows as JSONL: for another trainer, or as rows of any family."""
    from pairloop.cli.opening import open_store
    from pairloop.formats import describe, snapshot, write_rows

    with open_store(config_path) as (config, store):
        dataset = _dataset(store, config.policy.name, dataset_id)
        rows = snapshot.read_rows(store.artifacts.local(dataset.path) / snapshot.TRAIN_FILE)
    written = write_rows(out, rows, format_name, skip_refused=skip_refused)
    beside = describe(out, format_name)
    document = {
        "dataset_id": dataset.dataset_id,
        "format": format_name,
        "rows": written.rows,
        "refused": written.refused,
        "out": out,
        "beside": beside,
    }
    text = f"{written.rows} rows in {out}" + (f", described in {beside}" if beside is not None else "")
    show(document, _with_reasons(text, written.refused), as_json=as_json)


@data.command("stats")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="pairloop.toml: its store, or its rules for FILE."
)
@_family
@verb
def data_stats(file: Path | None, config_path: Path | None, family: str | None, as_json: bool) -> None:
    """Count rows, pairs, and what was not used and why: of FILE, or of the loop's newest dataset (before the
    first one: of what waits for it)."""
    document = _file_stats(file, family, config_path) if file is not None else _loop_stats(config_path or Path("."))
    counts = {**document["pairs"], **document["counts"]}
    cells = [(key.replace("_", " "), value) for key, value in counts.items() if value]
    text = table(("count", ""), cells) if cells else "no rows and no picks yet"
    show(document, _with_reasons(text, {**document.get("refused", {}), **document["dropped"]}), as_json=as_json)


def _loop_stats(config_path: Path) -> dict[str, Any]:
    """The newest dataset, and what has come since that the next cycle would use or set aside."""
    from pairloop.cli.opening import open_store
    from pairloop.loop import pairs as builder
    from pairloop.store import datasets

    with open_store(config_path) as (config, store):
        with store.reading() as c:
            newest = next(iter(datasets.list_(c, config.policy.name)), None)
        if newest is None:
            waiting = builder.compile_new(store, None, config, parent=_champion(store, config))
            pairs_of = {"train": len(waiting.compiled.train), "heldout": len(waiting.compiled.heldout)}
            return {"dataset_id": None, "pairs": pairs_of, "counts": waiting.counts, "dropped": waiting.dropped}
    return {
        "dataset_id": newest.dataset_id,
        "pairs": {"train": newest.n_train, "heldout": newest.n_heldout},
        "counts": newest.counts,
        "dropped": newest.dropped,
    }


def _file_stats(file: Path, family: str | None, config_path: Path | None) -> dict[str, Any]:
    from pairloop.config import load_config
    from pairloop.formats import read_rows
    from pairloop.loop import pairs as builder

    config = load_config(config_path)
    read = read_rows(file, family=family, max_chars=config.pairs.max_chars)
    compiled = builder.compile_pairs(read.groups, builder.PairRules.of(config, split_prompts=True))
    return {
        "file": file,
        "family": read.family,
        "rows": read.rows,
        "pairs": {"train": len(compiled.train), "heldout": len(compiled.heldout)},
        "counts": {"rows": read.rows, **read.counts, **compiled.counts},
        "refused": read.refused,
        "dropped": compiled.dropped,
        "problems": [str(problem) for problem in read.problems],
    }


@click.group(cls=Verbs)
def pairs() -> None:
    """Build datasets."""


@pairs.command("build")
@config_option
@verb
def pairs_build(config_path: Path, as_json: bool) -> None:
    """Compile the new groups and their feedback into one snapshot."""
    from pairloop.cli.opening import open_loop
    from pairloop.loop import pairs as stage

    with open_loop(config_path) as loop:
        compiling = stage.staged(loop.store, loop.policy.tokens, loop.config, parent=_champion(loop.store, loop.config))
        with compiling as new:
            assert new is not None, "nobody stops it"
            dataset = stage.record(loop.store, loop.config, new, cycle_id=None)
    text = new.text if dataset is None else _counted(dataset)
    document = {"dataset": dataset, "counts": new.counts, "dropped": new.dropped}
    show(document, _with_reasons(text, new.dropped), as_json=as_json)


def _counted(dataset: Dataset) -> str:
    return f"{dataset.dataset_id}: {dataset.n_train} training pairs, {dataset.n_heldout} held out"


def _champion(store: Store, config: Config) -> int:
    from pairloop.store import versions
    from pairloop.types import BASE_VERSION, Alias

    with store.reading() as c:
        return versions.alias(c, config.policy.name, Alias.CHAMPION) or BASE_VERSION


def _dataset(store: Any, policy: str, dataset_id: str | None) -> Dataset:
    from pairloop.errors import NotFoundError
    from pairloop.store import datasets

    with store.reading() as c:
        found: Dataset | None = datasets.current(c, dataset_id) if dataset_id else next(iter(datasets.list_(c, policy)), None)
    if found is None:
        raise NotFoundError(f"no dataset {dataset_id or ''} of {policy}; `pairloop pairs build` makes one")
    return found


def _with_reasons(text: str, reasons: Mapping[str, int]) -> str:
    return f"{text}\n{table(('not used because', 'count'), list(reasons.items()))}" if reasons else text


COMMANDS = (data, pairs)
