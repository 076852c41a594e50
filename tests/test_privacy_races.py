"""What else happens while someone is erased, or while what is old goes: neither takes from under the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from tests.loop_rig import Rig, open_rig, settings
from tests.test_privacy import JANE, WORDS, bytes_of, plant, registered

from pairloop.config import Config
from pairloop.errors import ConflictError, UnavailableError, UserError
from pairloop.loop import cycle, deploy, privacy
from pairloop.loop.cycle.context import CycleLease
from pairloop.loop.train import folder_of
from pairloop.policy.fake import write_skill
from pairloop.policy.protocols import Policy
from pairloop.store import Store, datasets, doctor, files, jobs, removed, repair, runs, versions
from pairloop.store.files import FileStatus, Purpose, StoredFile
from pairloop.store.jobs import Job, JobStatus
from pairloop.store.removed import Why
from pairloop.types import Alias, Dataset, Run, RunStatus, Version, VersionKind


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path / "state", privacy={"redact": "off", "keep_versions": 0})) as made:
        yield made


def add(rig: Rig, number: int, parent: int = 0, **values: Any) -> Version:
    """A version with weights of its own."""
    with rig.store.artifacts.stage() as folder:
        write_skill(folder, number)
        artifact = rig.store.artifacts.publish(folder, {})
    at, path = datetime.now(UTC), str(artifact.path)
    version = Version("bot", number, VersionKind.ADAPTER, path, artifact.hash, parent, None, None, at, **values)
    rig.store.write(lambda c: versions.insert(c, version))
    return version


class Loading:
    """A policy whose loading takes as long as ``meanwhile``."""

    def __init__(self, policy: Policy, meanwhile: Callable[[], object]) -> None:
        self._policy, self._meanwhile = policy, meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def load(self, version: Version) -> None:
        self._policy.load(version)
        if version.number:
            self._meanwhile()


def alias_of(rig: Rig, alias: Alias) -> int | None:
    with rig.store.reading() as c:
        return versions.alias(c, "bot", alias)


def by_hand(rig: Rig, policy: Policy, _: Config) -> object:
    return deploy.promote_by_hand(rig.store, policy, "bot", number=1, reason="test")


def as_canary(rig: Rig, policy: Policy, config: Config) -> object:
    return deploy.start_canary(rig.store, policy, config, number=1, reason="test")


@pytest.mark.parametrize("name", [by_hand, as_canary])
def test_weights_that_went_while_they_were_loaded_get_no_alias(rig: Rig, name: Callable[[Rig, Policy, Config], object]) -> None:
    version, config = add(rig, 1), rig.loop.config
    policy = cast(Policy, Loading(rig.policy, lambda: privacy.sweep(rig.store, config)))
    with pytest.raises(ConflictError, match="pairloop rebuild 1"):
        name(rig, policy, config)
    assert (alias_of(rig, Alias.CHAMPION), alias_of(rig, Alias.CANARY)) == (0, None)
    assert [path.name for path in Path(version.path).iterdir()] == ["manifest.json"]
    assert doctor.check(rig.store) == []


def test_an_alias_of_removed_weights_is_told_and_moved(rig: Rig) -> None:
    version = add(rig, 1)
    deploy.promote_by_hand(rig.store, rig.policy, "bot", number=1, reason="test")
    rig.store.write(lambda c: removed.mark(c, version.path, Why.RETENTION, datetime.now(UTC)))
    assert [(one.code, one.subject) for one in doctor.check(rig.store)] == [("unusable_alias", "bot@champion")]
    assert repair.mend(rig.store, actor="tester").problems == []
    assert alias_of(rig, Alias.CHAMPION) == 0


class Meanwhile:
    """A store beside which ``act`` happens before each write."""

    def __init__(self, store: Store, act: Callable[[], object]) -> None:
        self._store, self._act = store, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, fn: Any) -> Any:
        self._act()
        return self._store.write(fn)


def test_no_cycle_begins_while_someone_is_erased(rig: Rig) -> None:
    rig.serve(30)
    plant(rig)
    refused = []

    def begin() -> None:
        with pytest.raises(ConflictError, match="cycle:bot is held by") as caught:
            cycle.run(rig.loop, trigger="test", should_stop=lambda: True)
        refused.append(caught.value)

    store = cast(Store, Meanwhile(rig.store, begin))
    assert privacy.erase(store, rig.loop.config, JANE, reason="asked").counts["groups"] == 1
    assert len(refused) >= 3, "before lineage, groups and feedback"
    assert WORDS.encode() not in bytes_of(rig.loop.config.state_dir)
    assert cycle.run(rig.loop, trigger="test", should_stop=lambda: True).number == 1, "the lease was given back"


def test_nobody_is_erased_while_a_cycle_moves(rig: Rig) -> None:
    rig.serve(2)
    plant(rig)
    with CycleLease(rig.loop), pytest.raises(ConflictError, match="a cycle of bot is running already"):
        privacy.erase(rig.store, rig.loop.config, JANE, reason="asked")
    assert privacy.read(privacy.path_of(rig.loop.config)) == []
    assert not privacy.preview(rig.store, rig.loop.config, JANE).is_empty


def has_run(rig: Rig, dataset: Dataset) -> Path:
    """A run on the dataset that has ended; its log."""
    now = datetime.now(UTC)
    run = Run("run_1", "bot", None, dataset.dataset_id, 0, RunStatus.SUCCEEDED, "o", 1, now, now, {}, {}, None, now)
    rig.store.write(lambda c: runs.insert(c, run))
    log = folder_of(rig.loop.config, run) / "child.log"
    log.parent.mkdir(parents=True)
    log.write_text(WORDS)
    return log


class Away:
    """A store whose artifacts' place is away."""

    def __init__(self, store: Store) -> None:
        self._store, self.artifacts = store, self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name) if hasattr(self._store, name) else getattr(self._store.artifacts, name)

    def clear(self, _path: object, *, with_manifest: bool) -> bool:
        raise UnavailableError(f"away, {with_manifest=}")


def again(rig: Rig) -> object:
    return privacy.erase(rig.store, rig.loop.config, JANE, reason="again")


def by_age(rig: Rig) -> object:
    return privacy.sweep(rig.store, rig.loop.config)


@pytest.mark.parametrize("finish", [again, by_age])
def test_an_erasure_that_failed_on_its_folders_is_finished(rig: Rig, finish: Callable[[Rig], object]) -> None:
    rig.serve(30)
    plant(rig)
    dataset, _ = registered(rig)
    log = has_run(rig, dataset)
    with pytest.raises(UnavailableError):
        privacy.erase(cast(Store, Away(rig.store)), rig.loop.config, JANE, reason="asked")
    assert Path(dataset.path).exists()
    log.write_text(WORDS)  # as if it had been killed before this, or on another machine
    finish(rig)
    assert not Path(dataset.path).exists()
    assert not log.exists()
    assert doctor.check(rig.store) == []


def test_a_folder_that_is_gone_is_not_visited_again(rig: Rig) -> None:
    add(rig, 1)
    assert privacy.sweep(rig.store, rig.loop.config).versions == ("bot@1",)
    assert removed.sweep(cast(Store, Away(rig.store))) == 0
    add(rig, 1 + 1)
    with pytest.raises(UnavailableError):
        privacy.sweep(cast(Store, Away(rig.store)), rig.loop.config)
    assert removed.sweep(rig.store) == 1


def test_the_manifest_that_is_left_of_removed_weights_is_no_stray(rig: Rig) -> None:
    version = add(rig, 1)
    privacy.sweep(rig.store, rig.loop.config)
    os.utime(version.path, (0, 0))  # long ago
    assert doctor.check(rig.store) == []
    assert rig.store.artifacts.manifest_of(version.path)


def test_what_models_and_trainings_rest_on_stays(rig: Rig) -> None:
    now, config = datetime.now(UTC), rig.loop.config
    for number in (1, 2, 4, 5, 6):
        add(rig, number)
    job = Job("ftjob-1", JobStatus.SUCCEEDED, "bot", "bot", 1, "file-1", {}, 0, now)
    file = StoredFile("file-1", "rows.jsonl", Purpose.FINE_TUNE, 1, "0" * 64, "rows", FileStatus.PROCESSED, None, now)
    rig.store.write(lambda c: files.insert(c, file))
    rig.store.write(lambda c: jobs.insert(c, job))
    rig.store.write(lambda c: jobs.insert(c, replace(job, job_id="ftjob-2", status=JobStatus.QUEUED, parent=4)))
    run = Run("run_1", "bot", None, "dataset_1", 5, RunStatus.RUNNING, "o", 1, now, now, {}, {}, None, now)
    dataset = Dataset("dataset_1", "bot", str(config.artifacts_dir / "d"), 1, 1, {}, {}, now)
    rig.store.write(lambda c: datasets.insert(c, dataset, feedback_seq=0, cycle_id=None, pairs=[]))
    rig.store.write(lambda c: runs.insert(c, run))
    add(rig, 3, parent=2, job_id="ftjob-1", model_name="ft:bot:x")
    assert privacy.due(rig.store, config).versions == ("bot@1", "bot@6"), "nobody starts from version 1 any more"


def test_what_was_trained_on_removed_weights_waits_for_them(rig: Rig) -> None:
    add(rig, 1)
    add(rig, 2, parent=1)
    assert privacy.sweep(rig.store, rig.loop.config).versions == ("bot@1", "bot@2")
    with pytest.raises(UserError, match="`pairloop rebuild 1` first"):
        privacy.rebuild(rig.store, rig.loop.config, 2, owner="t:0")
