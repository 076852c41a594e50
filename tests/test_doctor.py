"""The doctor: silent about a healthy store, and each planted fault is named."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
from tests.store_rows import BOT, NOW, a_cycle, a_dataset, a_group, a_pick, a_version
from tests.stores import open_store, somebody_else

from pairloop.config import Config
from pairloop.formats import snapshot
from pairloop.store import Artifact, Store, cycles, datasets, doctor, duels, feedback, files, groups, repair, versions
from pairloop.store.files import FileStatus, Purpose, StoredFile
from pairloop.store.findings import FINDINGS
from pairloop.types import Alias, CycleState, CycleStep, Duel, PairSide, PreferencePair, Source, VersionKind


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder)
    return folder


@pytest.fixture
def store(prepared: Path, tmp_path: Path) -> Iterator[Store]:
    """A store of this test's own, after one promoted cycle; its files are copied, which is cheaper than to migrate them."""
    config = Config(state_dir=tmp_path)
    if config.database_url.startswith("sqlite"):
        shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    else:
        prepare(tmp_path)
    with Store.open(config) as opened:
        yield opened


def prepare(folder: Path) -> None:
    """Make the state directory of a store after one promoted cycle: a dataset of one pair, a version of it, the champion."""
    with Store.open(Config(state_dir=folder)) as opened:
        rows, weights = publish_snapshot(opened), publish(opened, "adapter.safetensors")
        dataset = replace(a_dataset("data_1"), path=str(rows.path))
        trained = a_version(1, path=str(weights.path), artifact_hash=weights.hash, dataset_id="data_1")
        pick = a_pick("g", feedback_id="pick")
        write = opened.write
        write(partial(groups.insert, group=a_group("g")))
        write(partial(feedback.insert, row=pick))
        write(partial(cycles.insert, cycle=a_cycle()))
        pairs = [("pair_1", ["g"], ["pick"])]
        write(partial(datasets.insert, dataset=dataset, feedback_seq=1, cycle_id="cycle_bot_1", pairs=pairs))
        # The base is a model folder of the user's, not an artifact.
        write(partial(versions.insert, version=a_version(0, path="/nowhere", kind=VersionKind.BASE)))
        write(partial(versions.insert, version=trained))
        write(partial(versions.set_alias, policy=BOT, alias=Alias.CHAMPION, number=1))
        write(
            partial(
                versions.record_promotion,
                policy=BOT,
                number=1,
                previous=0,
                action="promote",
                reason="won",
                cycle_id="cycle_bot_1",
                at=NOW,
            )
        )
        duel = Duel("duel_1", "cycle_bot_1", BOT, 0, 1, NOW)
        write(partial(duels.open, duel=duel))
        write(partial(duels.close, duel_id="duel_1", at=NOW))
        write(partial(cycles.step, cycle_id="cycle_bot_1", step=CycleStep(CycleState.PROMOTED, {}, NOW)))


def publish_snapshot(store: Store) -> Artifact:
    """A snapshot of one pair, made of the group ``g`` and its pick."""
    sides = (PairSide("yes", (1, 2), (-0.5, -0.25)), PairSide("no", (1, 2), (-0.5, -0.25)))
    pair = PreferencePair("pair_1", "hello g", *sides, Source.HUMAN, group_ids=("g",), feedback_ids=("pick",))
    with store.artifacts.stage() as folder:
        snapshot.write_folder(folder, [pair])
        return store.artifacts.publish(folder, {})


def publish(store: Store, name: str) -> Artifact:
    with store.artifacts.stage() as folder:
        (folder / name).write_text(name)
        return store.artifacts.publish(folder, {})


def upload(store: Store, content: bytes, file_id: str = "file-1") -> StoredFile:
    path, size, sha256 = store.artifacts.keep_file(file_id, BytesIO(content), limit=99)
    file = StoredFile(file_id, "rows.jsonl", Purpose.FINE_TUNE, size, sha256, str(path), FileStatus.PROCESSED, None, NOW)
    store.write(partial(files.insert, file=file))
    return file


def plant(store: Store, sql: str) -> None:
    """Change the file behind the store's back, as a person with a shell of the database would: no foreign keys are checked."""
    with somebody_else(store) as connection:
        connection.exec_driver_sql(sql)


def codes(store: Store) -> list[str]:
    return [problem.code for problem in doctor.check(store)]


def only_problem(store: Store) -> doctor.Problem:
    """The one that there is, beside that the champion's artifact is not whole."""
    (problem,) = [problem for problem in doctor.check(store) if problem.code != "unusable_alias"]
    return problem


def artifact_of(store: Store, table: str) -> Path:
    with somebody_else(store) as connection:
        path = connection.exec_driver_sql(f"SELECT path FROM {table} ORDER BY created_at DESC").scalar()
    return store.artifacts.root / str(path)


def test_a_healthy_store_has_no_problems(store: Store) -> None:
    assert doctor.check(store) == []


def test_an_empty_store_has_no_problems(tmp_path: Path) -> None:
    with open_store(tmp_path / "artifacts") as empty:
        assert doctor.check(empty) == []


def test_an_alias_of_no_version(store: Store) -> None:
    plant(store, "UPDATE aliases SET number = 7")
    problem = only_problem(store)
    assert problem.code == "dangling_alias"
    assert "alias champion of bot names version 7" in problem.text


def test_a_policy_without_champion(store: Store) -> None:
    plant(store, "DELETE FROM aliases")
    assert codes(store) == ["no_champion"]


@pytest.mark.parametrize(("table", "file"), [("versions", "adapter.safetensors"), ("datasets", "train.jsonl")])
def test_a_tampered_artifact_file(store: Store, table: str, file: str) -> None:
    (artifact_of(store, table) / file).write_text("tampered with")
    problem = only_problem(store)
    assert problem.code == "broken_artifact"
    assert f"{file}: was changed" in problem.text
    assert ("version bot@1" if table == "versions" else "dataset data_1") in problem.text


def test_an_artifact_folder_that_is_gone(store: Store) -> None:
    path = artifact_of(store, "versions")
    path.rename(path.with_name("moved"))
    problem = only_problem(store)
    assert problem.code == "missing_artifact"
    assert str(path) in problem.text
    assert codes(store) == ["missing_artifact", "unusable_alias"]


def test_a_version_that_names_another_hash(store: Store) -> None:
    plant(store, "UPDATE versions SET artifact_hash = 'ffff' WHERE number = 1")
    assert codes(store) == ["broken_artifact", "unusable_alias"]


def test_a_pair_without_feedback(store: Store) -> None:
    plant(store, "DELETE FROM pair_feedback")
    problem = only_problem(store)
    assert problem.code == "pair_without_feedback"
    assert "dataset data_1: pair pair_1" in problem.text


def test_a_pair_without_group(store: Store) -> None:
    plant(store, "DELETE FROM pair_groups")
    assert codes(store) == ["pair_without_group"]


def test_a_dataset_without_pairs(store: Store) -> None:
    plant(store, "DELETE FROM dataset_pairs")
    assert codes(store) == ["dataset_without_pairs"]


def test_rows_whose_parents_are_gone(store: Store) -> None:
    plant(store, "DELETE FROM groups")
    problems = doctor.check(store)
    assert {problem.code for problem in problems} == {"orphan"}
    found = sorted(problem.text.split()[0] for problem in problems)
    assert found == ["completions", "completions", "feedback", "pair_groups"]
    assert all("names no row of groups" in problem.text for problem in problems)


def test_a_duel_left_open_by_a_cycle_that_ended(store: Store) -> None:
    plant(store, "UPDATE duels SET closed_at = NULL")
    problem = only_problem(store)
    assert problem.code == "open_duel"
    assert "duel_1" in problem.text


def test_a_stale_temporary_folder(store: Store) -> None:
    folder = store.artifacts.root / "tmp" / "stage-gone"
    folder.mkdir()
    assert doctor.check(store) == []  # someone may be writing there now
    os.utime(folder, (0, 0))
    assert codes(store) == ["stale_folder"]


def test_what_a_killed_restore_left_is_found_and_removed(store: Store, tmp_path: Path) -> None:
    is_file = store.url.get_backend_name() == "sqlite"
    copy = Path(f"{store.url.database if is_file else tmp_path / 'database.sqlite'}.restoring")
    for path in (copy, Path(f"{copy}-wal"), Path(f"{copy}-aside")):
        path.write_bytes(b"words")
    assert doctor.check(store) == []  # it may be at work now
    os.utime(copy, (0, 0))
    assert codes(store) == ["unfinished_restore"]
    assert repair.mend(store, actor="test").problems == []
    assert not list(copy.parent.glob("*.restoring*"))


def test_an_artifact_that_no_row_names(store: Store) -> None:
    folder = publish(store, "of a writer that died").path
    assert doctor.check(store) == []  # its row may be on the way
    os.utime(folder, (0, 0))
    problem = only_problem(store)
    assert problem.code == "unreferenced_artifact"
    assert str(folder) in problem.text


def test_uploaded_files(store: Store) -> None:
    file = upload(store, b"rows")
    assert doctor.check(store) == []
    Path(file.path).write_bytes(b"wors")
    assert codes(store) == ["broken_file"]
    Path(file.path).unlink()
    assert codes(store) == ["missing_file"]


def test_every_code_is_explained_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    for code, found in FINDINGS.items():
        assert f"| `{code}` | {found.meaning} | {found.repair or 'no'} | {found.by_hand} |" in page


@pytest.mark.sqlite("its file")
def test_a_damaged_database_file(store: Store) -> None:
    """One byte flips inside the file, past SQLite: a row names a cycle that never was."""
    name = store.name
    store.close()
    file = Path(name)
    raw = file.read_bytes()
    *_, where = (found.start() for found in re.finditer(rb'(?<!")cycle_bot_1', raw))  # in a column, not in an event's JSON
    file.write_bytes(raw[:where] + b"cycle_bot_9" + raw[where + len(b"cycle_bot_1") :])
    with Store.open(Config(state_dir=file.parent)) as damaged:
        assert doctor.check(damaged) != []
