"""A run's newest checkpoint at the URL: another machine goes on from it, to the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tests.faults_keeping import checkpoints_of, contents, machine
from tests.store_rows import NOW, a_run
from tests.tiny_models import byte_tokenizer, write_model
from tests.train_rig import World, config_of, some_pairs

from pairloop.config import Config
from pairloop.errors import StoreError, UnavailableError
from pairloop.learner.job import TrainJob, TrainResult, TrainStatus, last_checkpoint
from pairloop.loop import cycle
from pairloop.loop.privacy import folders
from pairloop.loop.train import elsewhere, folder_of, metrics_of
from pairloop.loop.train.elsewhere import Shared, attempt_shared
from pairloop.store import Store, removed, runs
from pairloop.store.checkpoints import FarCheckpoints
from pairloop.store.remote import RemoteArtifacts
from pairloop.types import RunStatus, VersionKind


def put(far: FarCheckpoints, folder: Path, step: int) -> None:
    folder.mkdir()
    (folder / "weights").write_text(f"after {step}")
    far.put(step, folder)
    shutil.rmtree(folder)


@pytest.fixture
def far(tmp_path: Path) -> RemoteArtifacts:
    return machine(tmp_path, "a")


def test_the_newest_whole_checkpoint_takes_the_place_of_the_older_ones(far: RemoteArtifacts, tmp_path: Path) -> None:
    of_run = checkpoints_of(far)
    assert of_run.newest() is None
    of_run.clear()
    for step in (10, 20):
        put(of_run, tmp_path / "made", step)
    put(of_run, tmp_path / "made", 15)  # a worker that was stopped for long, and has been overtaken
    run = tmp_path / "url" / "checkpoints" / "run_1"
    assert sorted(path.name for path in run.rglob("weights")) == ["weights", "weights"]
    assert of_run.newest() == 20
    (run / "step-00000020" / "manifest.json").unlink()
    assert of_run.newest() == 15
    (tmp_path / "here").mkdir()
    of_run.fetch(15, tmp_path / "here")
    assert contents(tmp_path / "here") == {"weights": "after 15"}
    (run / "step-00000015" / "weights").write_text("changed")
    with pytest.raises(StoreError, match=r"weights: is not what was uploaded"):
        of_run.fetch(15, tmp_path / "here")
    assert far.unreferenced([], older_than_s=-1.0) == []
    assert far.leftovers(older_than_s=-1.0) == []
    assert far.sharing_runs(older_than_s=3600.0) == {}
    assert far.sharing_runs() == {"run_1": f"local://{tmp_path}/url/checkpoints/run_1"}
    of_run.clear()
    assert contents(tmp_path / "url") == {}


def test_a_checkpoint_that_goes_while_it_is_copied_is_not_shared(
    far: RemoteArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run_1"
    first, second = (run / "checkpoints" / f"step-{step:08d}" for step in (10, 20))
    first.mkdir(parents=True)
    for file in ("optimizer", "weights"):
        (first / file).write_text(file)
    (run / "metrics.jsonl").write_text('{"step": 10}\n')
    looks = []

    def overtaken(folder: Path) -> tuple[int, Path] | None:
        """The second look is the sender's; right after it the training saves the next one, and begins to remove this one."""
        found = last_checkpoint(folder)
        looks.append(found)
        if len(looks) == 2:
            shutil.copytree(first, second)
            (first / "weights").unlink()
        return found

    monkeypatch.setattr(elsewhere, "last_checkpoint", overtaken)
    job = TrainJob.in_folder(
        run,
        base_dir="fake",
        parent_path=None,
        parent_kind=VersionKind.BASE,
        parent_version=0,
        method="lora",
        snapshot_dir=str(run / "data"),
    )
    shared = Shared(far, lambda: False)
    attempt_shared(shared, job, lambda: TrainResult(TrainStatus.PAUSED))
    assert checkpoints_of(far).newest() is None
    attempt_shared(shared, job, lambda: TrainResult(TrainStatus.PAUSED))
    assert checkpoints_of(far).newest() == 20


def test_checkpoints_are_shared_unless_told_otherwise(tmp_path: Path) -> None:
    store = {"database": f"sqlite:///{tmp_path / 'shared.sqlite'}", "artifacts": f"memory://{tmp_path}"}
    for shares, section in ((True, {}), (False, {"artifacts_checkpoints": False})):
        with Store.open(config_of(tmp_path, store={**store, **section})) as opened:
            assert (opened.artifacts.checkpoints("run_1") is not None) is shares
    with Store.open(config_of(tmp_path)) as opened:
        assert opened.artifacts.checkpoints("run_1") is None


def test_clearing_asks_the_url_only_for_runs_of_which_something_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention does so each hour, for every run that was ever trained on data which is gone."""
    store_at = {"database": f"sqlite:///{tmp_path / 'shared.sqlite'}", "artifacts": f"memory://{tmp_path}"}
    config, cleared = config_of(tmp_path, store=store_at), list[FarCheckpoints]()
    clear = FarCheckpoints.clear

    def counted(far: FarCheckpoints) -> None:
        cleared.append(far)
        clear(far)

    monkeypatch.setattr(FarCheckpoints, "clear", counted)
    with Store.open(config) as store:
        world = World(store, config, some_pairs(20))
        ended = [replace(a_run(f"run_{n}"), dataset_id=world.dataset.dataset_id, cycle_id=None) for n in range(1, 4)]
        for run in ended:
            store.write(partial(runs.insert, run=replace(run, status=RunStatus.SUCCEEDED)))
        store.write(partial(removed.mark, path=world.dataset.path, why=removed.Why.RETENTION, at=NOW))
        far = store.artifacts.checkpoints("run_2")
        assert far is not None
        put(far, tmp_path / "made", 10)
        folders.clear(store, config)
        assert (far.newest(), len(cleared)) == (None, 1)
        folders.clear(store, config)
        assert len(cleared) == 1

        def away(_: RemoteArtifacts) -> None:
            raise UnavailableError("nobody answers")

        monkeypatch.setattr(RemoteArtifacts, "sharing_runs", away)
        folders.clear(store, config)  # nothing is left to be swept: retention goes on to the texts


# --- a run or a job that is ended while its last checkpoint is on its way


def interrupted(folder: Path) -> None:
    """What a training leaves that was stopped after its tenth step."""
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000010" / "weights").write_text("after 10")
    (folder / "metrics.jsonl").write_text('{"step": 10, "of": 20, "tokens": 8}\n')


def ended_meanwhile(monkeypatch: pytest.MonkeyPatch, end: Callable[[], object]) -> list[int]:
    """Somebody ends it after an upload began and before the first file is there; the steps that were uploaded."""
    uploaded, put_all = list[int](), FarCheckpoints.put

    def late(far: FarCheckpoints, step: int, folder: Path) -> None:
        end()
        put_all(far, step, folder)
        assert far.newest() == step
        uploaded.append(step)

    monkeypatch.setattr(FarCheckpoints, "put", late)
    return uploaded


def shared_at(tmp_path: Path) -> dict[str, Any]:
    return {"database": f"sqlite:///{tmp_path / 'shared.sqlite'}", "artifacts": f"memory://{tmp_path}/url"}


def at_the_url(tmp_path: Path) -> list[str]:
    return [str(path) for path in fsspec.filesystem("memory").find(f"{tmp_path}/url/checkpoints")]


def test_what_is_still_uploaded_when_a_run_is_ended_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, store=shared_at(tmp_path))
    with Store.open(config) as store:
        world = World(store, config, some_pairs(20))
        uploaded = ended_meanwhile(monkeypatch, lambda: cycle.cancel(store, "cycle_1", reason="enough", actor="test"))

        def stops() -> bool:
            (row,) = world.runs()
            interrupted(folder_of(config, row))
            return True

        world.train(should_stop=stops)
        assert uploaded == [10]
        assert world.runs()[0].status is RunStatus.CANCELLED
        assert at_the_url(tmp_path) == []


# --- with a real (tiny) model


class Gone(Exception):
    """The machine, with all that its process was about to do."""


class Machines:
    """Machines that share a database and a URL, each with a state directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = write_model(folder / "base", tokenizer=byte_tokenizer(), gain=3.0)

    def config(self, name: str, place: str = "shared", **train: Any) -> Config:
        store = {"database": f"sqlite:///{self.folder / place}.sqlite", "artifacts": f"memory://{self.folder}/{place}"}
        section = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 40, "checkpoint_every": 20, **train}
        policy = {"method": "full", "device": "cpu"}
        return config_of(self.folder / name, model=str(self.base), policy=policy, train=section, store=store)

    def lose(self, name: str) -> int:
        """Machine ``name`` begins the run and is gone, with its disk, once a checkpoint is at the URL: of which step."""
        config, reached = self.config(name), list[int]()
        with Store.open(config) as store:
            world = World(store, config, some_pairs(20))

            def is_shared() -> bool:
                (row,) = world.runs()
                far = store.artifacts.checkpoints(folder_of(config, row).name)
                assert far is not None
                reached.append(far.newest() or 0)
                if reached[-1]:
                    raise Gone
                return False

            with pytest.raises(Gone):
                world.train(should_stop=is_shared)
        shutil.rmtree(config.state_dir)
        return reached[-1]


@pytest.mark.slow
def test_a_run_whose_machine_is_gone_goes_on_elsewhere_to_the_same_bits(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    alone = machines.config("alone", "undisturbed")
    with Store.open(alone) as store:
        expected = World(store, alone, some_pairs(20)).train()
    reached = machines.lose("one")
    two = machines.config("two")
    with Store.open(two) as store:
        world = World.found(store, two)
        record = world.train(owner="two")
        (newest, _) = world.runs()
        assert (record.status, newest.owner, newest.attempt) == (RunStatus.SUCCEEDED, "two", 2)
        assert record.result["resumed_from"] >= reached >= 20
        assert record.version.artifact_hash == expected.version.artifact_hash
        steps = [row["step"] for row in metrics_of(two, newest) if "tokens" in row]
        assert steps == list(range(1, 201))
        assert store.artifacts.leftovers(older_than_s=-1.0) == []
        assert store.artifacts.sharing_runs() == {}
    assert fsspec.filesystem("memory").find(f"{tmp_path}/shared/checkpoints") == []


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_here_is_left_and_the_run_begins_anew(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    machines.lose("one")
    two = machines.config("two", learning_rate=2e-3)
    with Store.open(two) as store:
        record = World.found(store, two).train(owner="two")
        assert (record.status, record.result["resumed_from"], record.result["steps"]) == (RunStatus.SUCCEEDED, 0, 200)
