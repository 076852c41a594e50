"""Full disks at backups and at what is published or fetched; a restore where files have one name only; a cycle's canary.

Beside the kills at every label (test_faults.py).
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from tests import faults_deploy  # noqa: F401 - its scenarios
from tests.faults_keeping import broken_backups, broken_restore, contents, machine, publish, take
from tests.faults_rig import Prepared, begin, same_end

from pairloop import faults
from pairloop.errors import StoreError, UnavailableError
from pairloop.faults import Fault
from pairloop.store.archive import paths

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("keeping"))


@contextmanager
def full_at(label: str) -> Iterator[None]:
    """The disk is full where this process reaches the label for the first time."""
    faults.plant(Fault(label, "full"))
    try:
        yield
    finally:
        faults.plant(None)


def without_links() -> None:
    """A file system on which a file has one name."""

    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = link


# --- full disks


@pytest.mark.parametrize(
    "label",
    ["backup.database_copied", "artifact.before_flush", "file.before_rename", "backup.before_seal", "backup.before_rename"],
)
def test_a_disk_that_is_full_during_a_backup_leaves_the_earlier_one(prepared: Prepared, label: str) -> None:
    folder = prepared.copy("backup")
    (earlier,) = paths(folder / "backups")
    with full_at(label), pytest.raises(StoreError, match=r"backups: no backup was made: .*No space left on device"):
        take(folder)
    assert paths(folder / "backups") == [earlier]
    assert broken_backups(folder) == []
    assert not (folder / "backups" / ".making").exists(), "its room is free again"
    made = take(folder, keep=2)
    assert paths(folder / "backups") == [earlier, made.path]
    assert broken_backups(folder) == []


@pytest.mark.parametrize("label", ["artifact.before_flush", "remote.file_uploaded", "remote.before_manifest"])
def test_a_disk_that_is_full_while_an_artifact_is_published_is_named_and_nobody_sees_half(tmp_path: Path, label: str) -> None:
    here, there = machine(tmp_path, "a"), machine(tmp_path, "b")
    (tmp_path / "url").mkdir()
    with full_at(label), pytest.raises(UnavailableError, match=r"No space left on device"):
        publish(here)
    assert [path.name for path in (tmp_path / "url").iterdir() if there.is_whole(path.name)] == []
    made = publish(here)
    assert contents(there.local(there.path(made.hash))) == contents(made.path)
    assert there.leftovers(older_than_s=-1.0) == []


@pytest.mark.parametrize("label", ["remote.file_fetched", "remote.before_place", "remote.before_file_placed"])
def test_a_disk_that_is_full_while_something_is_fetched_is_named_as_ours(tmp_path: Path, label: str) -> None:
    here, there = machine(tmp_path, "a"), machine(tmp_path, "b")
    made = publish(here)
    upload, _, _ = here.keep_file("file-1", BytesIO(b"rows"), limit=10)
    wanted = [there.path(made.hash), there.root / upload.relative_to(here.root)]
    with full_at(label), pytest.raises(UnavailableError, match=r"No space left.*the disk of .*artifacts_cache_gb"):
        [there.local(path) for path in wanted]
    assert list((there.root / "tmp").iterdir()) == []
    assert contents(there.local(wanted[0])) == contents(made.path)
    assert there.local(wanted[1]).read_bytes() == b"rows"


# --- a restore


@pytest.mark.parametrize("label", ["restore.before_aside", "restore.set_aside", "restore.in_place"])
def test_a_restore_without_hard_links_never_leaves_a_place_empty(prepared: Prepared, label: str) -> None:
    with same_end(prepared, "restore") as folder:
        assert begin("restore", folder, Fault(label), without_links).end() == -signal.SIGKILL
        assert broken_restore(folder) == []
        assert begin("restore", folder, plant=without_links).end() == 0


# --- a cycle's canary, where its promotion dies


@pytest.mark.parametrize("label", ["promote.after_probe", "alias.moved_in_transaction", "promote.after_commit"])
def test_a_canary_whose_promotion_was_killed_is_promoted_once(prepared: Prepared, label: str) -> None:
    with same_end(prepared, "canary") as folder:
        assert begin("canary", folder, Fault(label)).end() == -signal.SIGKILL
        life = begin("canary", folder)
        assert life.end() == 0, life.log
