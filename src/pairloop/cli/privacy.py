"""erase, rebuild, retention: people's words taken out, versions made again without them, texts gone when they are old."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import config_option, show, table, verb

if TYPE_CHECKING:
    from pairloop.config import Config
    from pairloop.loop.privacy import Effect, Rebuilt, Swept
    from pairloop.store import Store

_dry_run = click.option("--dry-run", is_flag=True, help="Only say what would go.")


@click.command()
@click.option("--user", help="The `user` of their requests, or an operator's name in the audit trail.")
@click.option("--rater", help="The rater id of their picks; users and raters share their ids.")
@click.option("--reason", default="asked to be erased", show_default=True, help="Kept with the erasure; it should name nobody.")
@click.option(
    "--scrub", is_flag=True, help="Without a person: rewrite the database's file, however large, so that no byte is left."
)
@_dry_run
@config_option
@verb
def erase(
    user: str | None, rater: str | None, reason: str, scrub: bool, dry_run: bool, config_path: Path, as_json: bool
) -> None:
    """Erase a person: what they asked and were answered, what they said of any answer, and what was made of it.

    Texts, ids, comments and picks go, datasets lose the rows that rest on them, versions that had been trained on such rows
    are marked (`pairloop versions`; `pairloop rebuild` makes them again). The ledger erasures.jsonl keeps a salted hash, by
    which a restored backup is erased again.

    An id is looked for as it is given and as the pseudonym that stands for it. Who asked without an id is conversation:ID. An
    operator is named as in the audit trail (--user account:NAME, key:ID, cli:LOGIN): their own votes go, their name goes from
    the trail, from votes that they relabelled and from their account, which must be removed before; picks in the labelling
    queue are those of a rater of the plain name. A customer whose id has that form is named with --rater; where both are
    here, the operator is --user operator:account:NAME.
    """
    from pairloop.cli.opening import actor, open_store
    from pairloop.loop import privacy

    if scrub and user is None and rater is None:
        with open_store(config_path) as (_, store):
            is_done = store.scrub(limit_bytes=1 << 62)
        show({"scrubbed": is_done}, "rewritten" if is_done else "the database is in use; try again", as_json=as_json)
        return
    if not (user or rater) or (user is not None and rater is not None):
        raise click.UsageError("name one person: --user ID or --rater ID")
    with open_store(config_path) as (config, store):
        person = privacy.person_of(store, config, user=user, rater=rater)
        effect = (
            privacy.preview(store, config, person)
            if dry_run
            else privacy.erase(store, config, person, reason=reason, actor=actor())
        )
    show({"done": effect.erasure_id is not None, "effect": effect}, _effect_text(effect, is_preview=dry_run), as_json=as_json)


@click.command()
@click.argument("version", type=click.IntRange(1))
@click.option("--without", "without", multiple=True, metavar="RATER", help="A rater or user to leave out; may be given again.")
@click.option(
    "--chain", is_flag=True, help="Also make the ancestors again that were trained on rows of theirs, earliest first."
)
@config_option
@verb
def rebuild(version: int, without: tuple[str, ...], chain: bool, config_path: Path, as_json: bool) -> None:
    """Train VERSION (a number) again from its manifest: same parent, recipe and seed, and what is left of its dataset.

    It becomes a new version that nobody promotes: look at it, then `pairloop promote N --reason …`. Without --without, and
    where nothing was erased, its weights are the same to the last bit.
    """
    from pairloop.cli.opening import actor, open_store, owner
    from pairloop.cli.progress import TerminalWatcher
    from pairloop.loop import privacy

    with open_store(config_path) as (config, store), TerminalWatcher() as watcher:

        def heard(row: Mapping[str, Any]) -> None:
            watcher.bar("rebuilding", int(row["step"]), int(row["of"]))

        made = privacy.rebuild(
            store, config, version, without=without, chain=chain, owner=owner(), actor=actor(), on_progress=heard
        )
    show({"rebuilt": made}, "\n".join(map(_rebuilt_text, made)), as_json=as_json)


@click.command()
@_dry_run
@config_option
@verb
def retention(dry_run: bool, config_path: Path, as_json: bool) -> None:
    """Erase now what is older than privacy.keep_days, and weights beyond privacy.keep_versions; the server does so hourly."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.loop import privacy

    with open_store(config_path) as (config, store):
        swept = privacy.due(store, config) if dry_run else privacy.sweep(store, config, actor=actor())
        settings = config.privacy
    document = {"done": not dry_run, "swept": swept, "keep_days": settings.keep_days, "keep_versions": settings.keep_versions}
    show(document, _swept_text(swept, is_preview=dry_run), as_json=as_json)


def erase_again(store: Store, config: Config) -> None:
    """What was erased must not come back with a backup: by the ledger, and by the database that it replaces, whose rows tell
    also of erasures on other machines."""
    from pairloop.loop import privacy
    from pairloop.store.restore import known_erasures

    entries = privacy.read(privacy.path_of(config))
    listed = {entry.erasure_id for entry in entries}
    entries += [privacy.entry_of(one) for one in known_erasures(config) if one.erasure_id not in listed]
    privacy.reapply(store, config, entries)


def _effect_text(effect: Effect, *, is_preview: bool) -> str:
    if effect.is_empty:
        return "nothing of theirs is here"
    lines = ["would be erased:" if is_preview else f"erased ({effect.erasure_id}):"]
    lines.append(table(("what", "count"), [(noun.replace("_", " "), count) for noun, count in effect.counts.items()]))
    if effect.datasets:
        left = [(name, None if is_preview else after) for name, after in effect.datasets.items()]
        lines.append(table(("dataset", "" if is_preview else "what is left of it"), left))
    if effect.versions:
        lines.append(table(("version", "rows it was trained on"), list(effect.versions.items())))
        lines.append("these versions keep what they learned; `pairloop rebuild NUMBER --chain` makes them again without")
    if not is_preview and not effect.is_scrubbed:
        lines.append(
            "the database's file was not rewritten (large, or in use): `pairloop erase --scrub` does it in a quiet hour"
        )
    return "\n".join(lines)


def _rebuilt_text(one: Rebuilt) -> str:
    what = "the same weights" if one.same_weights else "other weights"
    text = f"{one.version.name} is version {one.rebuilt_from} made again, {what}; {one.rows_left_out} rows left out"
    if one.ancestors:
        names = ", ".join(map(str, one.ancestors))
        text += (
            f"\nwarning: it descends from version {names}, trained on rows of people who are left out; --chain rebuilds these"
        )
    return text


def _swept_text(swept: Swept, *, is_preview: bool) -> str:
    if swept.is_empty:
        return "nothing is older than what is to be kept"
    verb_ = "would go" if is_preview else "gone"
    return (
        f"{verb_}: texts of {swept.groups} groups, {len(swept.datasets)} datasets, "
        f"weights of {len(swept.versions)} versions{': ' + ', '.join(swept.versions) if swept.versions else ''}"
    )


COMMANDS = (erase, rebuild, retention)
