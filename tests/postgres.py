"""A real PostgreSQL for tests, and the run of the suite on it: ``pytest --database postgres`` (see ``make test-postgres``).

Each test process starts one server of its own, on a free loopback port, when the first store is opened. Each state directory
gets a database of its own, copied from one that was migrated once: 25 ms, where the migrations take 120.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.ports import hold_port, number_of

from pairloop.config import Config
from pairloop.store.database import migrate, parse_url, writer_engine

USER = "postgres"
"""initdb refuses root; root runs it as this user."""
TEMPLATE = "migrated"
OPENERS = (
    "pairloop.store",
    "blank_url",
    "tests.server",
    "tests.loop_rig",
    "tests.store_rows",
    "tests.stores",
    "serve: ",
    "pairloop.cli import pairloop",
)
"""What the source of a test module names where its tests open a store: the run on PostgreSQL takes those modules."""
STORELESS = "test_lab"
"""The lab has no store."""


def binary(name: str) -> str | None:
    return shutil.which(name) or next((str(path) for path in Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)


def missing() -> str | None:
    """Why there can be no PostgreSQL here, or None."""
    if binary("initdb") is None:
        return "PostgreSQL's initdb is not installed"
    if find_spec("psycopg") is None:
        return 'psycopg is not installed: pip install "pairloop[postgres]"'
    if os.geteuid() == 0 and not any(user.pw_name == USER for user in pwd.getpwall()):
        return f"initdb refuses root, and there is no user {USER}"
    return None


class PostgresServer:
    """A server in a folder of its own, in memory where there is /dev/shm; ``with`` starts and ends it."""

    def __init__(self) -> None:
        shared = Path("/dev/shm")
        where = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
        self._folder = Path(tempfile.mkdtemp(prefix="pairloop-postgres-", dir=where))
        self._place = hold_port()
        self._port = number_of(self._place)
        self._numbers = count()

    def start(self) -> None:
        if os.geteuid() == 0:
            user = pwd.getpwnam(USER)
            os.chown(self._folder, user.pw_uid, user.pw_gid)
        self._run("initdb", "--auth=trust", "--username=pairloop", "--encoding=UTF8", "--no-sync", *_collation())
        self.start_again()

    def start_again(self) -> None:
        """After ``kill``, with the same data and port."""
        settings = {"listen_addresses": "127.0.0.1", "fsync": "off", "max_connections": 300, "autovacuum": "off"}
        options = [f"-p {self._port} -k {self._folder}", *(f"-c {key}={value}" for key, value in settings.items())]
        self._run("pg_ctl", "start", "--wait", f"--log={self._folder / 'log'}", f"--options={' '.join(options)}")

    def kill(self) -> None:
        """End it without a checkpoint, as a crash would."""
        if "_admin" in self.__dict__:
            self._admin.close()
            del self._admin
        self._run("pg_ctl", "stop", "--mode=immediate")

    def remove(self) -> None:
        try:
            self.kill()
        finally:
            shutil.rmtree(self._folder)
            self._place.close()

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://pairloop@127.0.0.1:{self._port}/{name}"

    def blank(self) -> str:
        """The URL of a new database without a schema."""
        return self._create(f"blank_{next(self._numbers)}", "template0")

    def migrated(self) -> str:
        """The URL of a new database at head."""
        assert self._template
        return self._create(f"store_{next(self._numbers)}", TEMPLATE)

    def drop(self, url: str) -> bool:
        """False where somebody is connected."""
        name = sa.make_url(url).database
        asked = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name")
        if self._admin.execute(asked, {"name": name}).scalar():
            return False
        self._admin.exec_driver_sql(f"DROP DATABASE {name}")
        return True

    @cached_property
    def _admin(self) -> sa.Connection:
        engine = sa.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        return engine.connect()

    @cached_property
    def _template(self) -> bool:
        engine = writer_engine(parse_url(self._create(TEMPLATE, "template0")), "off")
        migrate(engine)
        engine.dispose()
        return True

    def _create(self, name: str, template: str) -> str:
        self._admin.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return self.url(name)

    def _run(self, name: str, *arguments: str) -> None:
        as_user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam(USER)
            as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        command = [*as_user, str(binary(name)), "-D", str(self._folder / "data"), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder)


def _collation() -> list[str]:
    """A language's order instead of that of bytes, as most databases have it; PostgreSQL takes it from ICU since 15."""
    told = subprocess.run([str(binary("initdb")), "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\d+", told)
    is_able = found is not None and int(found[0]) >= 15
    return ["--locale-provider=icu", "--icu-locale=en-US"] if is_able else []


@contextmanager
def running_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


class SuiteOnPostgres:
    """A plugin of pytest: a store of a state directory stands on PostgreSQL where its configuration names no database."""

    def __init__(self) -> None:
        self._server: PostgresServer | None = None
        self._urls: dict[Path, str] = {}
        self._configured = Config.database_url

    def url(self, state_dir: Path) -> str:
        """The database of a state directory, made with its first use."""
        if state_dir.resolve() not in self._urls:
            self._urls[state_dir.resolve()] = self._started().migrated()
        return self._urls[state_dir.resolve()]

    def blank(self) -> str:
        """A new database without a schema."""
        url = self._started().blank()
        self._urls[Path(url)] = url
        return url

    def _started(self) -> PostgresServer:
        if self._server is None:
            self._server = PostgresServer()
            self._server.start()
        return self._server

    def pytest_configure(self) -> None:
        def database_url(config: Config) -> str:
            return config.store.database or self.url(config.state_dir)

        Config.database_url = property(database_url)  # type: ignore[assignment, method-assign]

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if _opens_a_store(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
        reason = missing()
        for item in items:
            about_sqlite = item.get_closest_marker("sqlite")
            if reason is not None or about_sqlite is not None:
                item.add_marker(pytest.mark.skip(reason=reason or f"about SQLite: {_why(about_sqlite)}"))

    def pytest_runtest_logfinish(self) -> None:
        """Drop the databases of the test that ended; those in use belong to a fixture that lives on."""
        if self._server is not None:
            self._urls = {folder: url for folder, url in self._urls.items() if not self._server.drop(url)}

    def pytest_unconfigure(self) -> None:
        Config.database_url = self._configured  # type: ignore[method-assign]
        if self._server is not None:
            self._server.remove()


def _why(marker: Any) -> str:
    return str(marker.args[0])


_sources: dict[Path, bool] = {}


def _opens_a_store(item: pytest.Item) -> bool:
    if item.path not in _sources:
        source = item.path.read_text()
        _sources[item.path] = not item.path.name.startswith(STORELESS) and any(name in source for name in OPENERS)
    return _sources[item.path]
