"""After a restore: what was revoked, removed or changed since the backup stays so, and what was locked stays locked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection
from tests.test_cli import run as invoke

from pairloop.config import Config
from pairloop.store import Store, accounts, audit, backup, keys
from pairloop.store.accounts import Account, Role
from pairloop.store.archive import Archive
from pairloop.store.keys import Key, Scope
from pairloop.store.restore import Restored, restore

change = partial(accounts.change, actor="cli:x", reason="by hand")
remove = partial(accounts.remove, actor="cli:x", reason="by hand")
revoke = partial(keys.revoke, actor="cli:x", reason="by hand")
create_key = partial(keys.create, actor="cli:x", reason="by hand")
pytestmark = pytest.mark.sqlite("a database that is a file can be damaged")


def account(c: Connection, name: str, role: Role = Role.ADMIN, password: str = "first") -> None:
    accounts.create(c, name, role, password, actor="cli:x", reason="by hand")


@dataclass
class House:
    """A state directory, and the backups that are taken of it."""

    folder: Path

    @property
    def config(self) -> Config:
        return Config(state_dir=self.folder / "state")

    def write(self, *acts: Callable[[Connection], object]) -> None:
        with Store.open(self.config) as store:
            for act in acts:
                store.write(act)

    def back_up(self) -> Archive:
        with Store.open(self.config) as store:
            return Archive(backup.take(store, self.folder / "backups", actor="test").path)

    def restore(self, archive: Archive) -> Restored:
        return restore(archive, self.config, actor="test", force=True)

    def account(self, name: str) -> Account | None:
        with Store.open(self.config) as store, store.reading() as c:
            return accounts.get(c, name)

    def key(self, key: Key) -> Key | None:
        with Store.open(self.config) as store, store.reading() as c:
            return keys.get(c, key.key_id)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def a_key(name: str) -> Key:
    return keys.new(name, [Scope.ADMIN])[0]


def test_what_was_revoked_since_the_backup_stays_revoked(house: House) -> None:
    lost, kept = a_key("lost"), a_key("kept")
    house.write(partial(keys.insert, key=lost), partial(keys.insert, key=kept))
    house.write(*(partial(account, name=name) for name in ("ada", "bob", "eve", "mia", "zoe")))
    archive, now = house.back_up(), datetime.now(UTC)
    house.write(
        lambda c: revoke(c, lost.key_id, now),
        lambda c: remove(c, "ada"),
        lambda c: change(c, "bob", password_hash="second"),
        lambda c: change(c, "eve", role=Role.RATE),
        lambda c: remove(c, "mia"),
        lambda c: account(c, "mia", Role.OPERATE, "second"),
    )
    assert house.restore(archive).revocations == 5
    again, good = house.key(lost), house.key(kept)
    assert again is not None
    assert (again.revoked_at, again.ended(now)) == (now, "was revoked")
    assert good is not None
    assert good.revoked_at is None
    assert house.account("ada") is None
    found = {name: house.account(name) for name in ("bob", "eve", "mia", "zoe")}
    assert {name: (one.role, one.password_hash) for name, one in found.items() if one is not None} == {
        "bob": (Role.ADMIN, "second"),
        "eve": (Role.RATE, "first"),
        "mia": (Role.OPERATE, "second"),
        "zoe": (Role.ADMIN, "first"),
    }
    with Store.open(house.config) as store, store.reading() as c:
        told = [(one.action, one.subject) for one in audit.list_(c)]
    assert told[0][0] == "restore"
    assert {("key_revoke", f"key:{lost.key_id}"), ("account_remove", "account:ada")} <= set(told), "the trail says why"
    assert len(told) == len(set(told)) + 1, "no line comes twice (mia came twice)"


def test_a_newer_backup_is_not_undone_by_the_older_state_that_it_replaces(house: House) -> None:
    house.write(partial(account, name="ada"))
    first = house.back_up()
    house.write(lambda c: change(c, "ada", role=Role.RATE, password_hash="second"))
    second = house.back_up()
    (house.folder / "state" / "pairloop.sqlite").unlink()
    house.restore(first)  # the machine as it was once
    house.restore(second)
    found = house.account("ada")
    assert found is not None
    assert (found.role, found.password_hash) == (Role.RATE, "second")


def test_what_was_revoked_in_an_older_state_after_the_backup_stays_so_too(house: House) -> None:
    house.write(partial(account, name="ada"), partial(account, name="bob"))
    first = house.back_up()
    house.write(*(partial(change, name=name, password_hash="second") for name in ("ada", "bob")))
    second = house.back_up()
    (house.folder / "state" / "pairloop.sqlite").unlink()
    house.restore(first)  # the wrong one, at first
    house.write(lambda c: remove(c, "ada"))
    assert house.restore(second).revocations == 1
    assert house.account("ada") is None
    found = house.account("bob")
    assert found is not None
    assert found.password_hash == "second"


def test_an_account_of_another_installation_with_the_same_name_is_somebody_else(house: House, tmp_path: Path) -> None:
    house.write(partial(account, name="admin"))
    archive, elsewhere = house.back_up(), House(tmp_path / "elsewhere")
    elsewhere.write(partial(account, name="admin", password="theirs"), lambda c: remove(c, "admin"))
    assert elsewhere.restore(archive).revocations is None
    found = elsewhere.account("admin")
    assert found is not None
    assert found.password_hash == "first"


def test_a_backup_from_before_the_first_key_does_not_open_the_server(house: House) -> None:
    house.write()
    archive, key = house.back_up(), a_key("shop")
    house.write(partial(create_key, key=key), partial(account, name="ada"))
    assert house.restore(archive).revocations == 2
    assert house.key(key) == key
    assert house.account("ada") is not None
    with Store.open(house.config) as store, store.reading() as c:
        assert accounts.is_locked(c)


def test_where_nothing_can_tell_of_it_the_restore_says_so(house: House) -> None:
    key = a_key("shop")
    house.write(partial(create_key, key=key))
    archive = house.back_up()
    (house.folder / "state" / "pairloop.sqlite").write_bytes(b"what the disk left" * 100)
    (house.folder / "pairloop.toml").write_text(
        f'state_dir = "{house.config.state_dir}"\n[policy]\nmodel = "fake"\n', encoding="utf-8"
    )
    told = invoke("restore", str(archive.path), "--config", str(house.folder), "--force")
    assert (told.exit_code, "no former database tells of them: keys, accounts and passwords are those of" in told.output) == (
        0,
        True,
    )
    assert house.key(key) is not None
