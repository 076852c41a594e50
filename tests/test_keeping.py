"""The verbs doctor, backup, backups and restore, as a person types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.store_rows import a_group, a_pick, contents_of, put_groups, put_picks
from tests.test_cli import run
from tests.test_doctor import artifact_of, plant, prepared, store

from pairloop.config import load_config
from pairloop.store import Store, audit, feedback, groups

__all__ = ["prepared", "store"]  # the fixtures


def told(code: int, *args: str | Path) -> Any:
    """The document that the verb prints with this exit code."""
    result = run(*map(str, args), "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def configured(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "pairloop.toml").write_text('[policy]\nmodel = "fake"\n')
    return folder


def test_the_doctor_says_what_it_would_do_and_does_it(store: Store, tmp_path: Path) -> None:
    config = ("--config", configured(tmp_path))
    plant(store, "UPDATE duels SET closed_at = NULL")
    (problem,) = told(1, "doctor", *config)["problems"]
    assert (problem["code"], problem["repair"]) == ("open_duel", "the duel is closed")
    (planned,) = told(1, "doctor", *config, "--dry-run")["plan"]
    assert planned["action"] == "duel_1 closed"
    assert "would repair: duel duel_1 is open" in run("doctor", "--config", str(tmp_path), "--dry-run").output
    mended = told(0, "doctor", *config, "--repair")
    assert [one["action"] for one in mended["repairs"]] == ["duel_1 closed"]
    assert told(0, "doctor", *config, "--repair") == {"repairs": [], "problems": []}
    assert told(0, "doctor", *config) == {"problems": []}
    assert "add --repair" in told(2, "doctor", *config, "--accept-loss")["error"]["message"]


def test_backup_list_and_restore(store: Store, tmp_path: Path) -> None:
    config, folder = ("--config", configured(tmp_path)), tmp_path / "backups"
    assert "no backup" in told(2, "restore", configured(tmp_path / "empty"), *config)["error"]["message"]
    made = told(0, "backup", folder, *config)
    assert (made["copied"], made["manifest"]["missing"]) == (2, [])
    second = told(0, "backup", folder, *config, "--keep", "1")
    assert second["pruned"] == [Path(made["path"]).name]
    (listed,) = told(0, "backups", folder)["backups"]
    assert (listed["path"], listed["problems"]) == (second["path"], [])
    assert "whole" in run("backups", str(folder)).output

    elsewhere = configured(tmp_path / "elsewhere")
    done = told(0, "restore", folder, "--config", elsewhere)
    assert (done["copied"], done["aside"], done["problems"]) == (2, None, [])
    assert "--force" in told(2, "restore", folder, "--config", elsewhere)["error"]["message"]
    assert told(0, "restore", folder, "--config", elsewhere, "--force")["aside"] is not None
    with Store.open(load_config(elsewhere, env={})) as copy:
        now = contents_of(store)
        assert contents_of(copy) == {**now, "events": now["events"][:-1]}, "but for what tells of the backup itself"
        with copy.reading() as c:
            assert [entry.action for entry in audit.list_(c)].count("restore") == 1

    rotten = folder / "artifacts" / artifact_of(store, "versions").name / "adapter.safetensors"
    rotten.write_text("rotten")
    (listed,) = told(1, "backups", folder)["backups"]
    assert str(rotten) in listed["problems"][0]
    refused = told(1, "restore", folder, "--config", elsewhere, "--force")["error"]
    assert (refused["type"], str(rotten) in refused["message"]) == ("StoreError", True)


def test_who_was_erased_since_the_backup_does_not_come_back_with_it(tmp_path: Path) -> None:
    config = configured(tmp_path / "bot")
    with Store.open(load_config(config, env={})) as store:
        put_groups(store, a_group("hers", user="jane"), a_group("his", user="joe"))
        put_picks(store, a_pick("hers", rater="jane"))
    told(0, "backup", tmp_path / "backups", "--config", config)
    told(0, "erase", "--user", "jane", "--reason", "asked", "--config", config)
    told(0, "restore", tmp_path / "backups", "--config", config, "--force")
    with Store.open(load_config(config, env={})) as store, store.reading() as c:
        hers, his = groups.get(c, "hers"), groups.get(c, "his")
        assert hers is None or (hers.is_erased and hers.user is None)
        assert his is not None
        assert (his.is_erased, his.user) == (False, "joe")
        assert feedback.history(c, "hers") == []
