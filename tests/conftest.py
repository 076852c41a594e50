"""What all tests share: sockets only to loopback, one thread per test process, and real servers on a free port."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.postgres import SuiteOnPostgres
from tests.server import RunningServer
from tests.stores import open_store

from pairloop.store import Store

os.environ.setdefault("OMP_NUM_THREADS", "1")

REACHED = {"socket.connect", "socket.sendto"}
RESOLVED = {"socket.getaddrinfo", "socket.gethostbyname"}
LOCAL_NAMES = {"localhost", "", None}


class NetworkIsOff(RuntimeError):
    """A test reached for something beyond loopback."""


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _refuse_the_network(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: Python tells it of every connection before it is made."""
    if event in REACHED and isinstance(args[1], tuple):
        host = args[1][0]
    elif event in RESOLVED:
        host = args[0]
    else:
        return
    if not _is_local(host):
        raise NetworkIsOff(f"{event} to {host!r}: tests talk to loopback only")


sys.addaudithook(_refuse_the_network)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "where the tests' stores stand; postgres: on a server that is started for them, and only tests that open a store run"
    parser.addoption("--database", choices=["sqlite", "postgres"], default="sqlite", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--database") == "postgres":
        config.pluginmanager.register(SuiteOnPostgres(), "suite-on-postgres")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts real servers (see RunningServer for the options) that end with the test."""
    numbers = count()
    with ExitStack() as running:
        yield lambda **options: running.enter_context(RunningServer(tmp_path / f"server-{next(numbers)}", **options))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store of the test's own."""
    with open_store(tmp_path / "artifacts") as opened:
        yield opened


@pytest.fixture
def blank_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without a schema, of the kind that the run asks for."""
    suite = request.config.pluginmanager.get_plugin("suite-on-postgres")
    return suite.blank() if isinstance(suite, SuiteOnPostgres) else f"sqlite:///{tmp_path / 'blank.sqlite'}"
