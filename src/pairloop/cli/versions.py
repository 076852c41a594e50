"""versions: what the policy has become so far, and a version as a folder for use elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pairloop.cli.output import config_option, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from pairloop.store.erasures import Burden


@click.group(cls=Verbs, invoke_without_command=True)
@config_option
@verb
@click.pass_context
def versions(context: click.Context, config_path: Path, as_json: bool) -> None:
    """The policy's versions, with the aliases and what happened to each."""
    if context.invoked_subcommand is None:
        _list(config_path, as_json=as_json)


@versions.command("export")
@click.argument("name", metavar="VERSION")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--merged", is_flag=True, help="A whole model, the adapter folded into the base, in place of an adapter.")
@click.option(
    "--base", "base_name", metavar="NAME", help="What files and card call the base model: a hub id, before you publish."
)
@config_option
@verb
def export(name: str, out: Path, merged: bool, base_name: str | None, config_path: Path, as_json: bool) -> None:
    """Write VERSION to the new folder OUT, with a model card: a PEFT adapter, or a whole model with --merged.

    VERSION is a number or a model name, such as 12, support-bot@12, support-bot@challenger, or support-bot (its champion).
    transformers, PEFT and vLLM read the folder as it is.
    """
    from pairloop.cli.opening import open_store
    from pairloop.loop import export as stage
    from pairloop.store import versions as rows_of

    with open_store(config_path) as (config, store):
        with store.reading() as c:
            version = rows_of.named(c, config.policy.name, name)
        done = stage.run(store, config, version, out, merged=merged, base_name=base_name)
    what = {"adapter": f"a PEFT adapter of {done.base_model}", "model": "a whole model"}[done.form]
    show(done, f"{done.version}: {what} in {done.path}", as_json=as_json)


def _list(config_path: Path, *, as_json: bool) -> None:
    from pairloop.cli.opening import open_store
    from pairloop.store import erasures
    from pairloop.store import versions as rows_of
    from pairloop.types import Alias

    with open_store(config_path) as (config, store), store.reading() as c:
        name = config.policy.name
        found = rows_of.list_(c, name)
        aliases = {rows_of.alias(c, name, alias): alias.value for alias in reversed(Alias)}
        history = rows_of.promotions(c, name)
        burdens = erasures.burdens(c, name)
    found = [replace(version, path=store.artifacts.address(version.path)) for version in found]
    rows = [
        (
            version.number,
            aliases.get(version.number),
            version.kind,
            version.parent,
            ", ".join(event.action for event in history if event.number == version.number),
            f"{version.created_at:%Y-%m-%d %H:%M:%S}",
            *([_erased(burdens.get(version.number))] if burdens else []),
            version.path,
        )
        for version in found
    ]
    headers = ("version", "alias", "kind", "parent", "history", "made (UTC)", *(["erased people"] if burdens else []), "path")
    document = {
        "versions": found,
        "aliases": {alias: number for number, alias in aliases.items() if number is not None},
        "promotions": history,
        "erased": burdens,
    }
    show(document, table(headers, rows) if rows else "no version yet; `pairloop serve` registers version 0", as_json=as_json)


def _erased(burden: Burden | None) -> str:
    """What it had seen of people who were erased since."""
    if burden is None:
        return ""
    own = [f"{burden.rows} rows"] if burden.rows else []
    return ", ".join([*own, *(f"through {number}" for number in burden.ancestors)])


COMMANDS = (versions,)
