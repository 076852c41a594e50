"""accounts: people who sign in on the pages with a name and a password, and their roles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import config_option, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from pairloop.store.accounts import Account

ROLES = ("rate", "operate", "admin")
BY_HAND = "by hand"
role_option = click.option(
    "--role",
    type=click.Choice(ROLES),
    required=True,
    help="rate: chat and label. operate: also run the loop and read everything. admin: also keys, accounts and erasure.",
)


@click.group(cls=Verbs)
def accounts() -> None:
    """Accounts of people: once there is one (or a key), every page and request asks who comes.

    Passwords are asked for, or read from a line of stdin; they are never an argument, which other users of a machine can see.
    """


@accounts.command()
@click.argument("name")
@role_option
@config_option
@verb
def create(name: str, role: str, config_path: Path, as_json: bool) -> None:
    """Make an account."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.store import accounts as rows

    hashed = rows.hash_password(_password())
    with open_store(config_path) as (_, store):
        account = store.write(lambda c: rows.create(c, name, rows.Role(role), hashed, actor=actor(), reason=BY_HAND))
    show(_account_json(account), f"made the account {name}, role {role}; sign in at /login", as_json=as_json)


@accounts.command("list")
@config_option
@verb
def list_accounts(config_path: Path, as_json: bool) -> None:
    """All accounts, by name."""
    from pairloop.cli.opening import open_store
    from pairloop.store import accounts as rows

    with open_store(config_path) as (_, store), store.reading() as c:
        found = rows.list_(c)
    cells = [
        (
            one.name,
            one.role,
            f"{one.created_at:%Y-%m-%d %H:%M}",
            f"{one.last_login_at:%Y-%m-%d %H:%M}" if one.last_login_at else "",
        )
        for one in found
    ]
    text = (
        table(("name", "role", "made", "last sign-in"), cells)
        if cells
        else "no accounts yet: pairloop accounts create NAME --role admin"
    )
    show({"accounts": [_account_json(one) for one in found]}, text, as_json=as_json)


@accounts.command()
@click.argument("name")
@role_option
@config_option
@verb
def role(name: str, role: str, config_path: Path, as_json: bool) -> None:
    """Give an account another role; a running server goes by it within seconds."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.store import accounts as rows

    with open_store(config_path) as (_, store):
        account = store.write(lambda c: rows.change(c, name, role=rows.Role(role), actor=actor(), reason=BY_HAND))
    show(_account_json(account), f"{name} has the role {role}", as_json=as_json)


@accounts.command()
@click.argument("name")
@config_option
@verb
def password(name: str, config_path: Path, as_json: bool) -> None:
    """Give an account another password, and end its sessions."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.store import accounts as rows

    with open_store(config_path) as (_, store):
        with store.reading() as c:
            rows.need(c, name)
        hashed = rows.hash_password(_password())
        account = store.write(lambda c: rows.change(c, name, password_hash=hashed, actor=actor(), reason=BY_HAND))
    show(_account_json(account), f"{name} has a new password; its sessions have ended", as_json=as_json)


@accounts.command()
@click.argument("name")
@config_option
@verb
def remove(name: str, config_path: Path, as_json: bool) -> None:
    """Remove an account and end its sessions; a running server refuses them within seconds."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.store import accounts as rows

    with open_store(config_path) as (_, store):
        account = store.write(lambda c: rows.remove(c, name, actor=actor(), reason=BY_HAND))
    show(_account_json(account), f"removed {name}", as_json=as_json)


def _password() -> str:
    """Asked for twice at a terminal, else the first line of stdin."""
    if sys.stdin.isatty():
        typed: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
        return typed
    return sys.stdin.readline().rstrip("\r\n")


def _account_json(account: Account) -> dict[str, Any]:
    return {
        "name": account.name,
        "role": account.role.value,
        "created_at": account.created_at,
        "last_login_at": account.last_login_at,
    }


COMMANDS = (accounts,)
