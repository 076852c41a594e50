"""doctor, backup, backups, restore: that the store stays whole, and how it comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import EXIT_SYSTEM_FAILURE, config_option, show, table, verb
from pairloop.cli.privacy import erase_again
from pairloop.errors import StoreError

if TYPE_CHECKING:
    from pairloop.config import Config
    from pairloop.store import Store
    from pairloop.store.doctor import Problem
    from pairloop.store.repair import Repair
    from pairloop.store.restore import AfterRestore, Restored

AFTER_RESTORE: tuple[AfterRestore, ...] = (erase_again,)
"""Told of a store that something came back to from a backup, before anybody uses it."""

_backup_path = click.Path(path_type=Path, file_okay=False, exists=True)


@click.command()
@config_option
@click.option("--repair", "is_repair", is_flag=True, help="Mend what can be; each repair is recorded with its reason.")
@click.option("--dry-run", is_flag=True, help="Only say what --repair would do.")
@click.option(
    "--from", "backup_path", type=_backup_path, help="A backup, or a folder of them: what is gone comes back from it."
)
@click.option("--deep", is_flag=True, help="Read also the artifacts that lie at a URL, not only their names and sizes.")
@click.option("--accept-loss", is_flag=True, help="Record artifacts that no backup has as lost; they are no longer told.")
@verb
def doctor(
    config_path: Path, is_repair: bool, dry_run: bool, backup_path: Path | None, deep: bool, accept_loss: bool, as_json: bool
) -> None:
    """Check what must always hold: lineage, aliases, hashes. Exit code 1 where something does not.

    Repairs go through the store, also beside a running server, which answers with the version that an alias names from its next
    request on. docs/operations.md lists the codes.
    """
    from pairloop.cli.opening import actor, open_store
    from pairloop.errors import ConfigError
    from pairloop.store import repair
    from pairloop.store.archive import Archive

    if (backup_path is not None or accept_loss) and not (is_repair or dry_run):
        raise ConfigError("--from and --accept-loss say how to repair: add --repair, or --dry-run")
    archive = None if backup_path is None else Archive.find(backup_path)
    with open_store(config_path) as (config, store):
        if is_repair and not dry_run:
            mended = repair.mend(store, actor=actor(), archive=archive, accept_loss=accept_loss, deep=deep)
            if archive is not None:
                for act in AFTER_RESTORE:
                    act(store, config)
            problems: Sequence[Problem] = mended.problems
            document: dict[str, Any] = {"repairs": list(mended.repairs)}
            lines = [f"repaired: {one.problem}: {one.action}" for one in mended.repairs]
        else:
            problems, planned = repair.plan(store, archive=archive, accept_loss=accept_loss, deep=deep)
            document = {"plan": [_planned(one) for one in planned]} if dry_run else {}
            lines = [f"would repair: {one.problem.text}: {one.action}" for one in planned] if dry_run else []
        if problems:
            data = {"problems": len(problems), "codes": sorted({one.code for one in problems})}
            _tell(store, config, "doctor.problem", data)
    document["problems"] = [_problem(one) for one in problems]
    lines.append(_listed(problems) if problems else "all is well")
    show(document, "\n".join(lines), as_json=as_json)
    if problems:
        raise SystemExit(EXIT_SYSTEM_FAILURE)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@config_option
@click.option("--keep", type=click.IntRange(1), help="Remove all but so many of the newest backups afterwards.")
@verb
def backup(folder: Path, config_path: Path, keep: int | None, as_json: bool) -> None:
    """Back the store up into FOLDER, while the server goes on.

    A snapshot of the database, and the artifacts and uploads that it names; what an earlier backup in FOLDER has is not copied
    again. Exit code 1 where something is broken in the store itself: the backup is made without it, and says so.
    """
    from pairloop.cli.opening import actor, open_store
    from pairloop.store import backup as backups
    from pairloop.store import events

    with open_store(config_path) as (config, store):
        taken = backups.take(store, folder, actor=actor(), keep=keep)
        told = {"rows": sum(taken.manifest.rows.values()), "missing": len(taken.manifest.missing)}
        _tell(store, config, events.BACKUP, told)
    lines = [
        f"{taken.path}: {sum(taken.manifest.rows.values())} rows, {taken.copied} artifacts and uploads copied, "
        f"{taken.found} there already"
    ]
    lines += [f"removed {name}" for name in taken.pruned]
    lines += [f"missing in the store: {text}" for text in taken.manifest.missing]
    document = {"path": taken.path, "copied": taken.copied, "found": taken.found, "pruned": taken.pruned}
    show({**document, "manifest": taken.manifest}, "\n".join(lines), as_json=as_json)
    if taken.manifest.missing:
        raise SystemExit(EXIT_SYSTEM_FAILURE)


@click.command()
@click.argument("folder", type=_backup_path)
@verb
def backups(folder: Path, as_json: bool) -> None:
    """List the backups in FOLDER, and verify all of them. Exit code 1 where one was changed since it was made."""
    from pairloop.errors import StoreError
    from pairloop.store.archive import Archive, paths

    documents, rows = [], []
    known: dict[object, list[str]] = {}
    for path in paths(folder):
        try:
            archive = Archive(path)
            manifest, problems = archive.manifest, archive.problems(known)
        except StoreError as error:
            manifest, problems = None, [str(error)]
        documents.append({"path": path, "manifest": manifest, "problems": problems})
        counted = (
            (None, None, None) if manifest is None else (manifest.revision, sum(manifest.rows.values()), manifest.pairloop)
        )
        rows.append((path.name, *counted, "; ".join(problems) or "whole"))
    text = table(("backup", "revision", "rows", "pairloop", "state"), rows) if rows else f"no backups in {folder}"
    show({"backups": documents}, text, as_json=as_json)
    if any(one["problems"] for one in documents):
        raise SystemExit(EXIT_SYSTEM_FAILURE)


@click.command()
@click.argument("backup_path", metavar="BACKUP", type=_backup_path)
@config_option
@click.option("--force", is_flag=True, help="Also where there is data: the former database is moved aside, never deleted.")
@verb
def restore(backup_path: Path, config_path: Path, force: bool, as_json: bool) -> None:
    """Restore BACKUP (or the newest of a folder of backups) into what --config names; stop the server first.

    Into SQLite, or into a PostgreSQL database, whichever it was made of. Every hash is verified first, and an older schema is
    migrated; then the doctor looks at what was restored, with exit code 1 where something does not hold.
    """
    from pairloop.cli.opening import actor
    from pairloop.config import load_config
    from pairloop.store.archive import Archive
    from pairloop.store.restore import restore as bring_back

    done = bring_back(Archive.find(backup_path), load_config(config_path), actor=actor(), force=force, after=AFTER_RESTORE)
    rows = sum(done.manifest.rows.values())
    lines = [f"{done.path} is now {done.database}: {rows} rows, {done.copied} artifacts and uploads copied, {done.found} there"]
    lines += [f"the former database is {done.aside}"] if done.aside else []
    lines += _access_lines(done)
    lines += [_listed(done.problems)] if done.problems else ["all is well"]
    document = {"backup": done.path, "database": done.database, "aside": done.aside, "copied": done.copied}
    document |= {"found": done.found, "manifest": done.manifest, "revocations": done.revocations}
    document |= {"problems": [_problem(one) for one in done.problems]}
    show(document, "\n".join(lines), as_json=as_json)
    if done.problems:
        raise SystemExit(EXIT_SYSTEM_FAILURE)


def _access_lines(done: Restored) -> list[str]:
    """Who may come in now, where that is not as the backup has it, or should not be."""
    if done.revocations is not None:
        return [f"{done.revocations} keys and accounts stay as they became since the backup"] if done.revocations else []
    if not any(done.manifest.rows.get(table) for table in ("keys", "accounts")):
        return []
    return [
        f"no former database tells of them: keys, accounts and passwords are those of {done.manifest.taken_at:%Y-%m-%d %H:%M} "
        "UTC; revoke again what was revoked since (`pairloop keys list`, `pairloop accounts list`)"
    ]


def _tell(store: Store, config: Config, kind: str, data: Mapping[str, Any]) -> None:
    """Leave an event for webhooks and metrics; where that cannot be written, what the verb found matters more."""
    from pairloop.store import events

    try:
        store.write(lambda c: events.put(c, kind, config.policy.name, data, datetime.now(UTC)))
    except StoreError as error:
        click.echo(f"not recorded for webhooks: {error}", err=True)


def _planned(repair: Repair) -> dict[str, Any]:
    return {"code": repair.problem.code, "problem": repair.problem.text, "action": repair.action}


def _problem(problem: Problem) -> dict[str, Any]:
    return {"code": problem.code, "text": problem.text, "repair": problem.repair, "by_hand": problem.by_hand}


def _listed(problems: Sequence[Problem]) -> str:
    """Each problem, and what can be done about it; only once where it is the same for several."""
    told: set[str] = set()
    lines = []
    for one in problems:
        lines.append(f"{one.code}: {one.text}")
        if one.code not in told:
            lines += [f"  --repair: {one.repair}"] if one.repair else []
            lines.append(f"  by hand: {one.by_hand}")
        told.add(one.code)
    return "\n".join(lines)


COMMANDS = (doctor, backup, backups, restore)
