"""The doctor's repairs: each planted damage is mended, recorded, and found once; what cannot be mended stays, with advice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tests.store_rows import BOT, NOW, a_cycle, a_version, contents_of
from tests.test_doctor import artifact_of, plant, prepared, publish, store, upload

from pairloop.errors import UnavailableError
from pairloop.store import Store, backup, cycles, doctor, duels, files, jobs, repair, repairs, versions
from pairloop.store.archive import Archive, paths
from pairloop.store.artifacts import Artifacts
from pairloop.store.jobs import Job, JobStatus
from pairloop.types import Alias, CycleState, CycleStep, Duel

__all__ = ["prepared", "store"]  # the fixtures


def dump(store: Store) -> object:
    """All rows, and all files beside the artifacts."""
    root = store.artifacts.root
    return contents_of(store), [(str(path), path.read_bytes()) for path in sorted(root.rglob("*")) if path.is_file()]


def lose_the_champion(store: Store) -> None:
    shutil.rmtree(artifact_of(store, "versions"))


def lose_an_upload(store: Store) -> None:
    Path(upload(store, b"rows").path).unlink()


def leave_an_artifact(store: Store) -> None:
    os.utime(publish(store, "of a writer that died").path, (0, 0))


def leave_an_upload(store: Store) -> None:
    """Deleted, and the server died before its content was."""
    path = Path(upload(store, b"rows").path)
    store.write(partial(files.forget, file_ids=["file-1"], at=NOW))
    os.utime(path, (0, 0))


def leave_a_folder(store: Store) -> None:
    folder = store.artifacts.root / "tmp" / "stage-gone"
    folder.mkdir()
    os.utime(folder, (0, 0))


def challenge_with_nothing(store: Store) -> None:
    """A duel against a version that does not exist."""
    store.write(partial(cycles.insert, cycle=a_cycle(2)))
    store.write(partial(duels.open, duel=Duel("duel_2", "cycle_bot_2", BOT, 1, 2, NOW)))
    store.write(partial(cycles.step, cycle_id="cycle_bot_2", step=CycleStep(CycleState.DUELLING, {}, NOW)))
    plant(store, f"INSERT INTO aliases (policy, alias, number) VALUES ('{BOT}', 'challenger', 2)")


def answer_by_nothing(store: Store) -> None:
    """A canary of a version that does not exist."""
    plant(store, f"INSERT INTO aliases (policy, alias, number) VALUES ('{BOT}', 'canary', 2)")


DAMAGES: list[tuple[str | Callable[[Store], None], list[str], str]] = [
    ("UPDATE aliases SET number = 7", ["dangling_alias"], "champion of bot is version 1"),
    ("DELETE FROM aliases", ["no_champion"], "champion of bot is version 1"),
    (answer_by_nothing, ["dangling_alias"], "alias canary of bot cleared"),
    (challenge_with_nothing, ["dangling_alias"], "alias challenger of bot cleared"),
    ("UPDATE duels SET closed_at = NULL", ["open_duel"], "duel_1 closed"),
    ("DELETE FROM pair_feedback", ["pair_without_feedback"], "lineage of 1 pairs read"),
    ("DELETE FROM pair_groups", ["pair_without_group"], "lineage of 1 pairs read"),
    ("DELETE FROM dataset_pairs", ["dataset_without_pairs"], "lineage of 1 pairs read"),
    (lose_an_upload, ["missing_file"], "marked as deleted"),
    (leave_an_artifact, ["unreferenced_artifact"], "moved to"),
    (leave_an_upload, ["unreferenced_artifact"], "moved to"),
    (leave_a_folder, ["stale_folder"], "removed"),
]


def damage(store: Store, what: str | Callable[[Store], None]) -> None:
    plant(store, what) if isinstance(what, str) else what(store)


@pytest.mark.parametrize(("what", "codes", "action"), DAMAGES, ids=lambda value: value[0] if isinstance(value, list) else None)
def test_each_damage_is_mended_and_recorded_once(
    store: Store, what: str | Callable[[Store], None], codes: list[str], action: str
) -> None:
    damage(store, what)
    before = dump(store)
    problems, planned = repair.plan(store)
    assert [problem.code for problem in problems] == codes
    assert all(problem.repair for problem in problems)
    assert [one.action.startswith(action) for one in planned] == [True]
    assert dump(store) == before, "a plan changes nothing"
    mended = repair.mend(store, actor="test")
    assert ([one.code for one in mended.repairs], mended.problems) == (codes, [])
    with store.reading() as c:
        assert repairs.list_(c) == mended.repairs
    assert repair.mend(store, actor="test") == repair.Mended([], [])


def test_the_champion_goes_back_to_what_is_whole_and_the_move_is_recorded(store: Store) -> None:
    weights = publish(store, "weights of 2")
    for number, artifact in ((2, weights.hash), (3, "hash3")):
        path = str(store.artifacts.path(artifact))
        store.write(partial(versions.insert, version=a_version(number, path=path, artifact_hash=artifact)))
    with store.reading() as c:
        history = versions.promotions(c, BOT)
    for move in (replace(history[0], number=2, previous=1), replace(history[0], number=3, previous=2)):
        store.write(
            partial(
                versions.record_promotion,
                policy=BOT,
                number=move.number,
                previous=move.previous,
                action="promote",
                reason="won",
                cycle_id=None,
                at=NOW,
            )
        )
    store.write(partial(versions.set_alias, policy=BOT, alias=Alias.CHAMPION, number=3))
    (weights.path / "weights of 2").write_text("flipped")
    mended = repair.mend(store, actor="test")
    assert [one.action for one in mended.repairs] == ["champion of bot is version 1, the last promoted one that is whole"]
    with store.reading() as c:
        assert versions.alias(c, BOT, Alias.CHAMPION) == 1
        last = versions.promotions(c, BOT)[-1]
    assert (last.action, last.number, last.previous) == ("rollback", 1, 3)
    assert "bot@3, whose artifact is not whole" in last.reason
    assert {problem.code for problem in mended.problems} == {"missing_artifact", "broken_artifact"}
    accepted = repair.mend(store, accept_loss=True, actor="test")
    assert ({one.subject for one in accepted.repairs}, accepted.problems) == ({"bot@2", "bot@3"}, [])
    assert all(one.is_loss for one in accepted.repairs)


def test_artifacts_and_uploads_come_back_from_a_backup(store: Store, tmp_path: Path) -> None:
    file = upload(store, b"rows")
    taken = backup.take(store, tmp_path / "backups", actor="test")
    archive = Archive.find(tmp_path / "backups")
    lose_the_champion(store)
    (artifact_of(store, "datasets") / "train.jsonl").write_text("tampered with")
    Path(file.path).write_bytes(b"other")
    assert len(doctor.check(store)) == 4
    mended = repair.mend(store, archive=archive, actor="test")
    assert (len(mended.repairs), mended.problems) == (3, [])
    assert {one.action for one in mended.repairs} == {f"copied from the backup {taken.path.name}"}
    with store.reading() as c:
        assert versions.alias(c, BOT, Alias.CHAMPION) == 1, "its artifact came back, so nobody moved it"


def test_what_was_accepted_as_lost_still_comes_back_from_a_backup(store: Store, tmp_path: Path) -> None:
    backup.take(store, tmp_path / "backups", actor="test")
    lose_the_champion(store)
    mended = repair.mend(store, accept_loss=True, actor="test")
    assert ([one.code for one in mended.repairs], mended.problems) == (["unusable_alias", "missing_artifact"], [])
    mended = repair.mend(store, archive=Archive.find(tmp_path / "backups"), actor="test")
    assert ([one.subject for one in mended.repairs], mended.problems) == (["bot@1"], [])
    lose_the_champion(store)
    assert [problem.code for problem in doctor.check(store)] == ["missing_artifact"], "a second loss is told again"


def test_a_damaged_backup_gives_nothing_back(store: Store, tmp_path: Path) -> None:
    backup.take(store, tmp_path / "backups", actor="test")
    archive = Archive.find(tmp_path / "backups")
    (archive.artifacts.path(artifact_of(store, "datasets").name) / "train.jsonl").write_text("rotten")
    shutil.rmtree(artifact_of(store, "datasets"))
    mended = repair.mend(store, archive=archive, actor="test")
    assert ([one.code for one in mended.problems], mended.repairs) == (["missing_artifact"], [])


class Unreadable(Artifacts):
    """Artifacts on a disk that gives none of their files."""

    def verify(self, artifact_hash: str) -> None:
        raise UnavailableError(f"{self.path(artifact_hash)}: Permission denied")


def test_what_cannot_be_read_now_is_no_damage(store: Store, tmp_path: Path) -> None:
    """The champion does not go back for it, and a backup does not appear without it."""
    store.artifacts, whole = Unreadable(store.artifacts.root), store.artifacts
    before = dump(store)
    for act in (
        doctor.check,
        partial(repair.mend, actor="test"),
        partial(backup.take, folder=tmp_path / "backups", actor="test"),
    ):
        with pytest.raises(UnavailableError, match="Permission denied"):
            act(store)
    assert dump(store) == before
    assert paths(tmp_path / "backups") == []
    store.artifacts = whole
    assert doctor.check(store) == []


class Far(Artifacts):
    """Artifacts at a URL to which moving takes its time, and which is away for one of them."""

    def __init__(self, store: Store, lost: Path) -> None:
        super().__init__(store.artifacts.root)
        self._store, self._lost = store, lost

    def set_aside(self, path: Path, why: str) -> None:
        if path == self._lost:
            raise UnavailableError(f"{path}: the URL cannot be reached")
        self._store.write(lambda _: None)  # others write meanwhile
        super().set_aside(path, why)


def test_moving_aside_holds_up_no_write_and_failing_of_it_no_other_repair(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    left = [publish(store, name).path for name in "abc"]
    for path in left:
        os.utime(path, (0, 0))
    store.artifacts = Far(store, left[1])
    mended = repair.mend(store, actor="test")
    assert sorted(one.subject for one in mended.repairs) == sorted(map(str, (left[0], left[2])))
    assert [one.subject for one in mended.problems] == [str(left[1])]
    assert "not repaired: " in caplog.text
    assert [path.exists() for path in left] == [False, True, False]


def test_a_file_that_a_job_needs_is_not_given_up(store: Store) -> None:
    lose_an_upload(store)
    job = Job("job-1", JobStatus.QUEUED, BOT, BOT, 1, "file-1", {"type": "dpo"}, 0, NOW)
    store.write(partial(jobs.insert, job=job))
    mended = repair.mend(store, actor="test")
    assert ([one.code for one in mended.problems], mended.repairs) == (["missing_file"], [])
    assert "cancel the job" in mended.problems[0].by_hand


def test_evidence_that_is_gone_is_not_made_up(store: Store) -> None:
    plant(store, "DELETE FROM feedback")
    plant(store, "DELETE FROM pair_feedback")
    mended = repair.mend(store, actor="test")
    assert ([one.code for one in mended.problems], mended.repairs) == (["pair_without_feedback"], [])
    assert "restore" in mended.problems[0].by_hand


def test_a_champion_that_moved_meanwhile_is_left_alone(store: Store) -> None:
    plant(store, "UPDATE aliases SET number = 7")
    ((planned,),) = (repair.plan(store)[1],)
    plant(store, "UPDATE aliases SET number = 0")
    assert repair._perform(store, planned, "test") is None
    with store.reading() as c:
        assert versions.alias(c, BOT, Alias.CHAMPION) == 0
        assert repairs.list_(c) == []
