"""Opens what a verb works on, and closes it again."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pairloop.config import Config
    from pairloop.loop.cycle import Loop
    from pairloop.store import Store


def owner() -> str:
    """Who holds a lease: this process on this machine."""
    return f"{socket.gethostname()}:{os.getpid()}"


def actor() -> str:
    """Under whom the audit trail keeps what a command does."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a user id without a name, as in many containers
        return f"cli:{os.getuid()}"


@contextmanager
def open_store(config_path: Path) -> Iterator[tuple[Config, Store]]:
    from pairloop.config import load_config
    from pairloop.store import Store

    config = load_config(config_path)
    store = Store.open(config)
    try:
        yield config, store
    finally:
        store.close()


@contextmanager
def open_loop(config_path: Path) -> Iterator[Loop]:
    """Store and engine together, with version 0 registered."""
    from pairloop.loop.cycle import Loop, ensure_base
    from pairloop.policy.engine import open_policy

    with open_store(config_path) as (config, store):
        store.artifacts.reach()
        policy = open_policy(config, fetch=store.artifacts.hold)
        try:
            ensure_base(store, policy, config)
            yield Loop(store, policy, config, owner())
        finally:
            policy.close()
