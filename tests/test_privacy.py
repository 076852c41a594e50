"""People are erased, versions are made again without them, and what is old enough goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from sqlalchemy import Connection
from tests.loop_rig import Rig, open_rig, settings
from tests.server import RunningServer, chat_body
from tests.stores import open_store

from pairloop.cli import pairloop
from pairloop.config import Config
from pairloop.errors import ConflictError, UnavailableError, UserError
from pairloop.formats import snapshot
from pairloop.loop import deploy, pairs, privacy, raters, train
from pairloop.loop.privacy import ledger
from pairloop.policy.fake import write_skill
from pairloop.store import Store, audit, datasets, doctor, erasures, feedback, groups, removed, replies, stored, versions
from pairloop.store.quarantines import Action
from pairloop.store.replies import StoredReply
from pairloop.types import (
    COMMENT_METRIC,
    DEMONSTRATION_METRIC,
    Alias,
    Dataset,
    Feedback,
    GroupKind,
    Message,
    Source,
    Version,
    VersionKind,
)

JANE = "jane-sentinel"
WORDS = "sentinel-words"
ROWS = 4
"""Training rows that rest on Jane in `plant`: her pick, her pick beside, and her edit against both answers."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path / "state", privacy={"redact": "off"})) as made:
        yield made


def plant(rig: Rig) -> tuple[str, str]:
    """Of the training groups, one becomes Jane's own and another one gets her pick beside; their ids."""
    with rig.store.reading() as c:
        labelled, _ = feedback.labelled_since(c, rig.loop.name, after_seq=0, kinds=[GroupKind.TRAIN])
    own, other = (one.group for one in labelled[:2])
    mine = replace(own, group_id=f"{own.group_id[:-3]}abc", prompt=(Message("user", f"{WORDS} please help"),), user=JANE)
    mine = replace(mine, conversation_id=f"talk-of-{JANE}", metadata={"who": WORDS}, prompt_token_ids=(7, 7, 7))
    now = datetime.now(UTC)

    def said(name: str, group_id: str, metric: str, **values: Any) -> Feedback:
        return Feedback(f"said-{name}", group_id, metric, Source.HUMAN, values.pop("rater_id", JANE), now, **values)

    pick = next(row for row in labelled[0].feedback)
    rows = [
        replace(pick, feedback_id="jane-own", group_id=mine.group_id, rater_id=JANE),
        replace(labelled[1].feedback[0], feedback_id="jane-other", rater_id=JANE),
        said("comment", other.group_id, COMMENT_METRIC, value=f"{WORDS} comment"),
        said("edit", mine.group_id, DEMONSTRATION_METRIC, value=f"{WORDS} edit", text=WORDS, tags={"t": WORDS}),
        said("others", mine.group_id, COMMENT_METRIC, value=f"she said {WORDS}", rater_id="bob"),
    ]
    reply = StoredReply("hash", 200, {}, WORDS.encode(), now, mine.group_id)

    def write(c: Connection) -> None:
        groups.insert(c, mine)
        stored.insert(c, mine)
        replies.put(c, "caller", "key", reply)
        for row in rows:
            feedback.insert(c, row)

    rig.store.write(write)
    return mine.group_id, other.group_id


def compiled(rig: Rig) -> tuple[Dataset, Version]:
    """A dataset of all there is, and its parent, the champion."""
    loop = rig.loop
    with loop.store.reading() as c:
        parent = versions.get(c, loop.name, rig.champion)
    assert parent is not None
    dataset = pairs.run(loop.store, loop.policy.tokens, loop.config, cycle_id=None, parent=parent.number)
    assert dataset is not None
    return dataset, parent


def registered(rig: Rig) -> tuple[Dataset, Version]:
    """A dataset, and a version that is said to be trained on it: what is erased does not ask how."""
    dataset, parent = compiled(rig)
    with rig.store.artifacts.stage() as folder:
        write_skill(folder, parent.number + 1)
        artifact = rig.store.artifacts.publish(folder, {})
    version = Version(
        "bot",
        parent.number + 1,
        VersionKind.ADAPTER,
        str(artifact.path),
        artifact.hash,
        parent.number,
        dataset.dataset_id,
        None,
        datetime.now(UTC),
    )
    rig.store.write(lambda c: versions.insert(c, version))
    return dataset, version


def trained(rig: Rig) -> tuple[Dataset, Version]:
    """A dataset of all there is, and the version that was trained on it, in a process of its own."""
    dataset, parent = compiled(rig)
    done = train.run(rig.store, rig.loop.config, dataset=dataset, parent=parent, owner="tester:0")
    assert done.version is not None
    return dataset, done.version


def bytes_of(folder: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def rows_of(dataset: Dataset) -> list[str]:
    return [
        row.row_id
        for name in (snapshot.TRAIN_FILE, snapshot.HELDOUT_FILE)
        for row in snapshot.read_rows(Path(dataset.path) / name)
    ]


@pytest.mark.sqlite("the bytes of its file")
def test_a_person_is_erased_down_to_the_bytes(rig: Rig) -> None:
    rig.serve(40)
    mine, other = plant(rig)
    dataset, version = registered(rig)
    state = rig.loop.config.state_dir
    store, config = rig.store, rig.loop.config
    before = rows_of(dataset)
    assert WORDS.encode() in bytes_of(state)
    assert JANE.encode() in bytes_of(state)

    would = privacy.preview(store, config, JANE)
    effect = privacy.erase(store, config, JANE, reason="asked")
    assert would.counts == effect.counts
    assert effect.counts["groups"] == 1
    assert effect.counts["feedback"] == 4
    assert effect.is_scrubbed
    left = bytes_of(state)
    assert WORDS.encode() not in left
    assert JANE.encode() not in left
    assert not Path(dataset.path).exists()
    with store.reading() as c:
        clean = datasets.current(c, dataset.dataset_id)
        assert clean is not None
        assert effect.datasets == {dataset.dataset_id: clean.dataset_id}
        gone = groups.get(c, mine)
        assert gone is not None
        assert (gone.is_erased, gone.user, gone.conversation_id) == (True, None, None)
        assert [(row.rater_id, row.value) for row in feedback.history(c, mine)] == [("bob", None)]
        assert JANE not in [row.rater_id for row in feedback.history(c, other)]
        assert effect.versions == {version.name: effect.counts["training_rows"]}
        assert [mark.number for mark in erasures.marks(c, "bot")] == [version.number]
        assert dataset.dataset_id not in [one.dataset_id for one in datasets.list_(c, "bot")]
    kept = rows_of(clean)
    assert set(kept) < set(before)
    assert len(before) - len(kept) == effect.counts["training_rows"] == ROWS
    assert json.loads((Path(clean.path) / "manifest.json").read_text())["cleaned_from"] == dataset.dataset_id
    assert doctor.check(store) == []
    assert JANE not in (state / "erasures.jsonl").read_text()
    again = privacy.erase(store, config, JANE, reason="asked twice")
    assert again.is_empty
    assert again.erasure_id is None
    assert len(privacy.read(privacy.path_of(config))) == 1


@pytest.mark.sqlite("the bytes of its file")
def test_words_leave_the_database_also_while_the_artifacts_are_away(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.serve(40)
    plant(rig)
    dataset, _ = registered(rig)
    store, config = rig.store, rig.loop.config

    def away(*_: object, **__: object) -> bool:
        raise UnavailableError("nobody answers")

    with monkeypatch.context() as patched:
        patched.setattr(type(store.artifacts), "clear", away)
        with pytest.raises(UnavailableError):
            privacy.erase(store, config, JANE, reason="asked")
    assert WORDS.encode() not in b"".join(path.read_bytes() for path in config.state_dir.glob("*.sqlite*"))
    privacy.erase(store, config, JANE, reason="asked")
    assert WORDS.encode() not in bytes_of(config.state_dir)
    assert not Path(dataset.path).exists()


def test_a_second_person_is_erased_from_what_the_first_one_left(rig: Rig) -> None:
    rig.serve(30)
    plant(rig)
    dataset, version = registered(rig)
    with rig.store.reading() as c:
        bob = next(row.rater_id for row in feedback.recent(c, "bot", 60) if row.label is not None and row.rater_id != JANE)
    privacy.erase(rig.store, rig.loop.config, JANE, reason="one")
    with rig.store.reading() as c:
        middle = datasets.current(c, dataset.dataset_id)
    effect = privacy.erase(rig.store, rig.loop.config, bob, reason="two")
    with rig.store.reading() as c:
        last = datasets.current(c, dataset.dataset_id)
        burdens = erasures.burdens(c, "bot")
    assert middle is not None
    assert last is not None
    if effect.counts["training_rows"]:
        assert last.dataset_id not in (dataset.dataset_id, middle.dataset_id)
        assert not Path(middle.path).exists()
    assert burdens[version.number].rows == ROWS + effect.counts["training_rows"]
    assert doctor.check(rig.store) == []


@pytest.mark.sqlite("the bytes of its file")
def test_a_restored_backup_is_erased_again_by_the_ledger(rig: Rig, tmp_path: Path) -> None:
    rig.serve(30)
    plant(rig)
    dataset, _ = registered(rig)
    config = rig.loop.config
    backup = tmp_path / "backup"
    rig.store.scrub()
    shutil.copytree(config.state_dir, backup)
    privacy.erase(rig.store, config, JANE, reason="asked")
    entries = privacy.read(privacy.path_of(config))
    restored = config.model_copy(update={"state_dir": backup})
    with Store.open(restored) as store:
        assert WORDS.encode() in bytes_of(backup)
        counts = privacy.reapply(store, restored, entries)
        assert counts["erasures"] == 1
        assert counts["feedback"] == 4
        assert WORDS.encode() not in bytes_of(backup)
        assert JANE.encode() not in bytes_of(backup)
        assert doctor.check(store) == []
        assert privacy.reapply(store, restored, entries)["erasures"] == 0
        with store.reading() as c:
            assert [mark.erasure_id for mark in erasures.marks(c, "bot")] == [entries[0].erasure_id]
    assert dataset.dataset_id


class Dying:
    """A store whose process is killed at the ``n``-th write."""

    def __init__(self, store: Store, n: int) -> None:
        self._store, self._left = store, n

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, fn: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        return self._store.write(fn)


def test_an_erasure_that_was_killed_anywhere_is_finished_by_the_next(rig: Rig) -> None:
    rig.serve(30)
    plant(rig)
    registered(rig)
    for n in (0, 1, 2, 2):  # the cleaned dataset, lineage and marks, groups, feedback
        with pytest.raises(KeyboardInterrupt):
            privacy.erase(cast(Store, Dying(rig.store, n)), rig.loop.config, JANE, reason="asked")
    effect = privacy.erase(rig.store, rig.loop.config, JANE, reason="asked again")
    assert effect.counts["feedback"] == 4
    assert WORDS.encode() not in bytes_of(rig.loop.config.state_dir)
    assert JANE.encode() not in bytes_of(rig.loop.config.state_dir)
    assert doctor.check(rig.store) == []


@pytest.mark.slow
def test_nobody_is_erased_under_a_cycle_that_works_with_their_rows(rig: Rig) -> None:
    rig.serve(40)
    plant(rig)

    def while_training(_row: Any) -> None:
        with pytest.raises(ConflictError, match="trains on rows of theirs"):
            privacy.erase(rig.store, rig.loop.config, JANE, reason="asked")

    loop = rig.loop
    with loop.store.reading() as c:
        parent = versions.get(c, loop.name, 0)
    assert parent is not None
    dataset = pairs.run(loop.store, loop.policy.tokens, loop.config, cycle_id=None, parent=0)
    assert dataset is not None
    train.run(loop.store, loop.config, dataset=dataset, parent=parent, owner="t:0", on_progress=while_training)
    assert not privacy.preview(loop.store, loop.config, JANE).is_empty


def test_a_quarantined_rater_is_in_no_manifest_and_not_in_the_audit_trail(rig: Rig) -> None:
    rig.serve(30)
    plant(rig)
    raters.decide(rig.store, rig.loop.config, JANE, Action.QUARANTINE, "odd", actor="cli:ada")
    dataset, _ = compiled(rig)
    assert JANE in (Path(dataset.path) / "manifest.json").read_text()
    with rig.store.reading() as c:
        assert [one.subject for one in audit.list_(c)] == [f"rater:{JANE}"]
    privacy.erase(rig.store, rig.loop.config, JANE, reason="asked")
    assert JANE.encode() not in bytes_of(rig.loop.config.state_dir)
    assert doctor.check(rig.store) == []


def test_who_asked_without_a_name_is_erased_by_the_conversation(rig: Rig) -> None:
    rig.serve(2)
    with rig.store.reading() as c:
        labelled, _ = feedback.labelled_since(c, "bot", after_seq=0, kinds=[GroupKind.TRAIN])
    nameless = replace(labelled[0].group, group_id="chatcmpl-x", user=None, conversation_id="talk-1")
    rig.store.write(lambda c: groups.insert(c, nameless))
    assert privacy.erase(rig.store, rig.loop.config, "conversation:talk-1", reason="r").counts["groups"] == 1


# --- made again


@pytest.mark.slow
def test_a_version_is_made_again_to_the_same_bytes_and_without_a_rater_to_others(rig: Rig) -> None:
    rig.serve(40)
    plant(rig)
    dataset, version = trained(rig)
    same = privacy.rebuild(rig.store, rig.loop.config, version.number, owner="t:0")[0]
    assert same.same_weights
    assert (same.version.artifact_hash, same.version.parent) == (version.artifact_hash, version.parent)
    assert same.version.record is not None
    assert same.version.record["rebuilt_from"] == version.number
    without = privacy.rebuild(rig.store, rig.loop.config, version.number, without=[JANE], owner="t:0")[0]
    assert without.rows_left_out == ROWS
    with rig.store.reading() as c:
        clean = datasets.get(c, without.dataset_id)
        assert datasets.current(c, dataset.dataset_id) == datasets.get(c, dataset.dataset_id), "nothing was erased"
        assert versions.alias(c, "bot", Alias.CHAMPION) == 0, "nobody promotes it"
    assert clean is not None
    assert len(rows_of(clean)) == len(rows_of(dataset)) - ROWS
    assert without.version.dataset_id == clean.dataset_id
    assert JANE not in json.dumps(dict(without.version.record or {}))
    assert doctor.check(rig.store) == []


@pytest.mark.slow
def test_ancestors_that_had_seen_them_are_named_or_made_again_in_order(rig: Rig) -> None:
    rig.serve(40)
    plant(rig)
    _, first = trained(rig)
    deploy.promote_by_hand(rig.store, rig.policy, "bot", number=first.number, reason="test")
    rig.serve(40)
    _, second = trained(rig)
    assert second.parent == first.number
    privacy.erase(rig.store, rig.loop.config, JANE, reason="asked")
    alone = privacy.rebuild(rig.store, rig.loop.config, second.number, owner="t:0")
    assert [one.ancestors for one in alone] == [(first.number,)]
    made = privacy.rebuild(rig.store, rig.loop.config, second.number, chain=True, owner="t:0")
    assert [one.rebuilt_from for one in made] == [first.number, second.number]
    assert made[1].version.parent == made[0].version.number
    with rig.store.reading() as c:
        burdens = erasures.burdens(c, "bot")
    assert burdens[second.number].ancestors == (first.number,)
    assert not {one.version.number for one in made} & burdens.keys(), "these never saw them"


def test_what_cannot_be_made_again_says_why(rig: Rig) -> None:
    with pytest.raises(UserError, match="base model"):
        privacy.rebuild(rig.store, rig.loop.config, 0, owner="t:0")
    with pytest.raises(UserError, match="no version"):
        privacy.rebuild(rig.store, rig.loop.config, 7, owner="t:0")


def test_a_name_of_whom_nothing_was_learned_is_refused_before_it_trains(rig: Rig) -> None:
    rig.serve(20)
    plant(rig)
    _, version = registered(rig)
    for people in (["jannet"], [JANE, "jannet"]):
        with pytest.raises(UserError, match="nothing of 'jannet' is in what bot@1 and its ancestors"):
            privacy.rebuild(rig.store, rig.loop.config, version.number, without=people, owner="t:0")
    with pytest.raises(UserError, match="no manifest that says how"):  # it was never trained; of her there is something
        privacy.rebuild(rig.store, rig.loop.config, version.number, without=[JANE], owner="t:0")


def test_who_was_erased_is_no_stranger(rig: Rig) -> None:
    rig.serve(20)
    plant(rig)
    _, version = registered(rig)
    privacy.erase(rig.store, rig.loop.config, JANE, reason="asked")

    def refused(person: str) -> str:
        with pytest.raises(UserError) as told:
            privacy.rebuild(rig.store, rig.loop.config, version.number, without=[person], owner="t:0")
        return str(told.value)

    words = f"{JANE!r} was erased: what was erased is left out anyway, leave `--without {JANE}` away"
    assert refused(JANE) == words
    assert "nothing of 'jannet'" in refused("jannet")
    ledger.path_of(rig.loop.config).unlink()  # the database knows, too
    assert refused(JANE) == words


# --- by age


def test_texts_and_their_datasets_go_when_they_are_old_and_numbers_stay(rig: Rig) -> None:
    rig.serve(30)
    mine, _ = plant(rig)
    dataset, version = registered(rig)
    config = rig.loop.config.model_copy(update={"privacy": rig.loop.config.privacy.model_copy(update={"keep_days": 30.0})})
    assert privacy.sweep(rig.store, config).is_empty, "nothing is that old"
    later = datetime.now(UTC) + timedelta(days=31)
    would = privacy.due(rig.store, config, now=later)
    assert would.datasets == (dataset.dataset_id,)
    swept = privacy.sweep(rig.store, config, now=later)
    assert swept == would
    assert swept.groups == 37
    assert privacy.due(rig.store, config, now=later).is_empty
    rig.store.scrub()
    assert WORDS.encode() not in bytes_of(config.state_dir)
    with rig.store.reading() as c:
        kept = feedback.history(c, mine)
        assert [row.label for row in kept if row.feedback_id == "jane-own"] != [None], "the vote stays"
        assert datasets.current(c, dataset.dataset_id) is None
    assert doctor.check(rig.store) == []
    with pytest.raises(UserError, match="no manifest"):
        privacy.rebuild(rig.store, config, version.number, owner="t:0")


@pytest.mark.slow
def test_weights_that_nothing_rests_on_go_and_can_be_made_again(rig: Rig) -> None:
    rig.serve(30)
    dataset, first = trained(rig)
    deploy.promote_by_hand(rig.store, rig.policy, "bot", number=first.number, reason="test")
    rig.serve(30)
    second, third = trained(rig)[1], trained(rig)[1]
    assert second.artifact_hash == third.artifact_hash, "the same weights are one folder"
    config = rig.loop.config.model_copy(update={"privacy": rig.loop.config.privacy.model_copy(update={"keep_versions": 1})})
    assert privacy.due(rig.store, config).versions == (), "the newer one needs the folder of the older"
    none = config.model_copy(update={"privacy": config.privacy.model_copy(update={"keep_versions": 0})})
    assert privacy.sweep(rig.store, none).versions == (second.name, third.name)
    assert [path.name for path in Path(second.path).iterdir()] == ["manifest.json"]
    with pytest.raises(ConflictError, match="pairloop rebuild"):
        deploy.promote_by_hand(rig.store, rig.policy, "bot", number=second.number, reason="test")
    assert Path(first.path).exists(), "the champion stays"
    assert doctor.check(rig.store) == []
    with rig.store.reading() as c:
        assert removed.is_removed(c, second.path)
    shutil.rmtree(second.path)  # as after a restore: backups do not hold it
    again = privacy.rebuild(rig.store, none, second.number, owner="t:0")[0]
    assert again.same_weights
    with rig.store.reading() as c:
        assert not removed.is_removed(c, second.path), "they are there again"
    assert doctor.check(rig.store) == []
    assert dataset.dataset_id


# --- over HTTP and by hand


@pytest.mark.sqlite("the bytes of its file")
def test_an_erasure_over_http(tmp_path: Path) -> None:
    with RunningServer(tmp_path) as server:
        said = server.chat(user=JANE, messages=[{"role": "user", "content": WORDS}]).json()["id"]
        would = server.http.post("/v1/erasures", json={"user": JANE, "dryrun": True}).json()
        assert (would["id"], would["counts"]["groups"]) == (None, 1)
        done = server.http.post("/v1/erasures", json={"user": JANE, "reason": "asked"}, headers={"idempotency-key": "k"})
        assert done.status_code == 201
        erasure = done.json()
        assert JANE not in done.text
        assert server.http.get(f"/v1/erasures/{erasure['id']}").json()["counts"] == erasure["counts"]
        assert [one["id"] for one in server.http.get("/v1/erasures").json()["data"]] == [erasure["id"]]
        assert server.http.get(f"/v1/chat/completions/{said}").status_code == 404
        assert server.http.post("/v1/erasures", json={"rater": JANE}).json()["id"] is None, "nothing is left"
        assert server.http.post("/v1/erasures", json={"rater": JANE, "user": JANE}).status_code == 400
        assert server.http.get("/v1/erasures/none").status_code == 404
        assert server.chat(user=JANE).status_code == 200, "later requests are served"
        assert JANE.encode() in bytes_of(tmp_path)


def test_a_deleted_completion_is_in_the_ledger_too(tmp_path: Path) -> None:
    with RunningServer(tmp_path) as server:
        group_id = server.chat(**chat_body()).json()["id"]
        assert server.http.delete(f"/v1/chat/completions/{group_id}").status_code == 200
        assert server.http.delete(f"/v1/chat/completions/{group_id}").status_code == 404
        (entry,) = privacy.read(privacy.path_of(server.config))
        assert entry.group_id == group_id
        assert privacy.reapply(server.store, server.config, [entry]) == {"erasures": 0, "completions": 0}


def run_cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(pairloop, list(arguments))
    return result.exit_code, result.output


def test_the_verbs(tmp_path: Path) -> None:
    (tmp_path / "pairloop.toml").write_text(
        '[policy]\nmodel = "fake"\nname = "bot"\n[privacy]\nredact = "off"\nkeep_days = 90\n'
    )
    from pairloop.config import load_config

    config: Config = load_config(tmp_path, env={})
    with open_rig(config) as rig:
        rig.serve(30)
        plant(rig)
        _, version = registered(rig)
    where = ("--config", str(tmp_path))
    assert run_cli("erase", *where)[0] == 2
    code, text = run_cli("erase", "--user", JANE, "--dry-run", *where)
    assert (code, "would be erased" in text, version.name in text) == (0, True, True)
    assert run_cli("backup", str(tmp_path / "kept"), *where)[0] == 0
    code, text = run_cli("erase", "--rater", JANE, "--json", *where)
    assert (code, json.loads(text)["effect"]["counts"]["groups"]) == (0, 1)
    assert "nothing of theirs is here" in run_cli("erase", "--user", JANE, *where)[1]
    assert f"{ROWS} rows" in run_cli("versions", *where)[1]
    assert run_cli("restore", str(tmp_path / "kept"), "--force", *where)[0] == 0
    assert "nothing of theirs is here" in run_cli("erase", "--user", JANE, "--dry-run", *where)[1], "the ledger knows of it"
    privacy.path_of(config).unlink()  # it lies on another machine
    assert run_cli("restore", str(tmp_path / "kept"), "--force", *where)[0] == 0
    aside = [path for path in tmp_path.rglob("*.sqlite.before-restore-*") if not path.name.endswith(("-wal", "-shm"))]
    assert len(aside) == (2 if (config.state_dir / "pairloop.sqlite").exists() else 0), "also where two follow within a second"
    shutil.rmtree(tmp_path / "kept")
    assert WORDS.encode() not in bytes_of(tmp_path), "a backup does not bring them back"
    assert f"{ROWS} rows" in run_cli("versions", *where)[1]
    code, text = run_cli("rebuild", str(version.number), *where)
    assert (code, "no manifest that says how it was trained" in text) == (2, True)
    assert "nothing is older" in run_cli("retention", "--dry-run", *where)[1]
    assert run_cli("erase", "--scrub", *where) == (0, "rewritten\n")


@pytest.mark.slow
def test_a_real_model_is_made_again_to_the_same_bytes(tmp_path: Path) -> None:
    """A tiny transformer on the CPU, in float32: the same parent, rows, recipe and seed give the same weights."""
    from tests.tiny_models import byte_tokenizer, write_model
    from tests.train_rig import World, config_of, some_pairs

    base = write_model(tmp_path / "base", tokenizer=byte_tokenizer(), gain=3.0)
    config = config_of(tmp_path, model=str(base), train={"min_pairs": 4, "batch_size": 8, "epochs": 2})
    with open_store(tmp_path / "artifacts") as store:
        world = World(store, config, some_pairs(24))
        first = train.run(store, config, dataset=world.dataset, parent=world.base, owner="t:0").version
        assert first is not None
        other = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1, "seed": 7})})
        again = privacy.rebuild(store, other, first.number, owner="t:0")[0]
    assert again.version.number != first.number
    assert again.same_weights, "the manifest says how, not the configuration of now"
