"""Of one name there is one account or key that is good: nobody votes as somebody else, and no cap is dodged or stolen."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from tests.server import World

from pairloop.errors import ConflictError, InvalidRequestError
from pairloop.store import Store, accounts, keys, sessions
from pairloop.store.accounts import Role
from pairloop.store.keys import Key, Scope

create_key = partial(keys.create, actor="test", reason="test")
create_account = partial(accounts.create, role=Role.RATE, password_hash="hash", actor="test", reason="test")


def a_key(name: str | None, expires_at: datetime | None = None) -> Key:
    return keys.new(name, [Scope.RATE, Scope.FEEDBACK], expires_at=expires_at)[0]


def test_a_name_is_taken_as_long_as_its_holder_is_good(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        store, now = world.store, datetime.now(UTC)
        lost = a_key("ada")
        store.write(partial(create_key, key=lost))
        for taking in (partial(create_key, key=a_key(" ada ")), partial(create_account, name="ada")):
            with pytest.raises(ConflictError, match=rf"a key 'ada' \({lost.key_id}\)") as refused:
                store.write(taking)
            assert refused.value.param == "name"
        store.write(lambda c: keys.revoke(c, lost.key_id, now, actor="test", reason="lost"))
        store.write(partial(create_account, name="ada"))
        with pytest.raises(ConflictError, match="an account 'ada'") as refused:
            store.write(partial(create_key, key=a_key("ada")))
        assert refused.value.param == "name"
        store.write(lambda c: accounts.remove(c, "ada", actor="test", reason="left us"))
        store.write(partial(create_key, key=a_key("ada", expires_at=now + timedelta(seconds=60))))
        later = a_key("ada")
        object.__setattr__(later, "created_at", now + timedelta(seconds=61))  # when the former one has expired
        store.write(partial(create_key, key=later))
        first, second = a_key(None), a_key(None)
        assert first.name == f"unnamed {first.key_id}"
        store.write(partial(create_key, key=first))
        store.write(partial(create_key, key=second))
        with pytest.raises(InvalidRequestError, match="may not be called"):
            keys.new("expert:account:ada", [Scope.RATE])


def begin(store: Store, key: Key) -> str:
    session_id, _ = sessions.split(store.write(partial(sessions.begin, owner=key, address="198.51.100.7"))) or ("", "")
    return session_id


def test_of_keys_that_share_a_name_from_before_the_oldest_signs_in(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        store, first, second = world.store, a_key("shop"), a_key("shop")
        store.write(partial(keys.insert, key=second))
        session_id = begin(store, second)
        object.__setattr__(first, "created_at", second.created_at - timedelta(days=1))
        store.write(partial(keys.insert, key=first))  # as a database from before the rule holds it
        with store.reading() as c:
            assert sessions.get(c, session_id) is None, "a session of a shared name ends"
        assert begin(store, first)
        with pytest.raises(ConflictError, match="Another key or account is called 'shop'"):
            begin(store, second)
        store.write(lambda c: keys.revoke(c, first.key_id, datetime.now(UTC), actor="test", reason="lost"))
        assert begin(store, second), "the name is its own again"
        votes = replace(a_key("shop 2"), name="expert:account:ada")  # it would pick as the operator ada
        store.write(partial(keys.insert, key=votes))
        with pytest.raises(ConflictError, match="'expert:account:ada'"):
            begin(store, votes)
