"""The store on PostgreSQL: whole cycles on a server that the test starts, and what is said where it cannot be used."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from tests.loop_rig import open_rig, settings
from tests.test_fine_tuning import pair_rows

from pairloop.errors import ConfigError, StoreError
from pairloop.loop import cycle, jobs
from pairloop.store import Store, doctor
from pairloop.store.database import parse_url
from pairloop.store.jobs import walk
from pairloop.types import CycleState

POSTGRES_USER = "postgres"


def binary(name: str) -> str | None:
    return shutil.which(name) or next((str(path) for path in Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)


@pytest.fixture
def url() -> Iterator[str]:
    """A server of this test's own on a free loopback port; initdb refuses root, so that one runs it as ``postgres``."""
    folder = Path(f"/tmp/pairloop-postgres-{os.getpid()}")
    folder.mkdir()
    as_user: list[str] = []
    if os.geteuid() == 0:
        user = pwd.getpwnam(POSTGRES_USER)
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(name: str, *arguments: str) -> None:
        subprocess.run(
            [*as_user, str(binary(name)), "-D", str(folder / "data"), *arguments], check=True, capture_output=True, cwd=folder
        )

    try:
        run("initdb", "--auth=trust", "--username=pairloop", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", "start", "--wait", f"--log={folder / 'log'}", f"--options={options}")
        try:
            yield f"postgresql+psycopg://pairloop@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "--mode=immediate")
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(binary("initdb") is None, reason="PostgreSQL's initdb is not installed")
def test_two_cycles_from_picks_to_a_better_champion(url: str, tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason='needs the extra "postgres"')
    config = settings(tmp_path, store={"database": url})
    with open_rig(config) as rig:
        for number in (1, 2):
            rig.serve(60)
            done = cycle.run(rig.loop, trigger="test")
            while done.state is CycleState.DUELLING:
                rig.judge(40)
                done = cycle.run(rig.loop, trigger="test")
            assert (done.number, done.state) == (number, CycleState.PROMOTED)
        assert rig.champion == 2
        assert doctor.check(rig.store) == []
    with open_rig(config) as again:  # the schema is there, and is at head
        assert again.champion == 2


@pytest.mark.slow
@pytest.mark.skipif(binary("initdb") is None, reason="PostgreSQL's initdb is not installed")
def test_a_fine_tuning_job_from_rows_to_a_model(url: str, tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason='needs the extra "postgres"')
    with open_rig(settings(tmp_path, store={"database": url})) as rig:
        config, rows = rig.loop.config, BytesIO(pair_rows(64))
        file = jobs.upload(rig.store, config, rows, filename="rows.jsonl", purpose="fine-tune")
        body = {"training_file": file.file_id, "model": "bot", "method": {"type": "dpo"}, "metadata": {"team": "a"}}
        made = [jobs.create(rig.store, config, jobs.JobRequest.model_validate(body)) for _ in range(2)]
        while jobs.validate_next(rig.loop):
            pass
        jobs.pause(rig.store, made[0].job_id)
        assert jobs.train_next(rig.loop, lambda: False)
        jobs.resume(rig.store, made[0].job_id)
        jobs.cancel(rig.store, made[0].job_id)
        with rig.store.reading() as c:
            ended = [jobs.get(c, job.job_id) for job in made]
            listed = [job.job_id for job in walk(c)]
        assert [str(job.status) for job in ended] == ["cancelled", "succeeded"], ended
        assert listed == [job.job_id for job in made[::-1]]
        assert doctor.check(rig.store) == []


def test_a_driver_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as Python marks a module that cannot be imported
    with pytest.raises(ConfigError, match=r'needs the package psycopg: .*"pairloop\[postgres\]"') as caught:
        parse_url("postgresql+psycopg://pairloop:secret@127.0.0.1/pairloop")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["not a url", "nosuchdatabase://host/name"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a SQLAlchemy URL"):
        parse_url(text)


def test_a_server_that_is_away_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason='needs the extra "postgres"')
    with socket.socket() as taken:  # bound, and not listened on
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        config = settings(tmp_path, store={"database": f"postgresql+psycopg://pairloop:secret@127.0.0.1:{port}/pairloop"})
        with pytest.raises(StoreError, match=rf"127\.0\.0\.1:{port}") as caught:
            Store.open(config)
    assert "secret" not in str(caught.value)
