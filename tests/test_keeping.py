"""The verbs doctor, backup, backups and restore, as a person types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.store_rows import contents_of
from tests.test_cli import run
from tests.test_doctor import artifact_of, plant, prepared, store

from pairloop.config import load_config
from pairloop.store import Store

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
        restored = contents_of(copy)
        (entry,) = restored.pop("audit")
        assert "restore" in entry
        assert restored == {table: rows for table, rows in contents_of(store).items() if table != "audit"}

    rotten = folder / "artifacts" / artifact_of(store, "versions").name / "adapter.safetensors"
    rotten.write_text("rotten")
    (listed,) = told(1, "backups", folder)["backups"]
    assert str(rotten) in listed["problems"][0]
    refused = told(1, "restore", folder, "--config", elsewhere, "--force")["error"]
    assert (refused["type"], str(rotten) in refused["message"]) == ("StoreError", True)
