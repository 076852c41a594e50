"""From a configured name to a policy, and every way in which a model directory can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pairloop.config import parse_config
from pairloop.errors import ModelError
from pairloop.policy.engine import open_policy, resolve_model
from pairloop.policy.fake import FakePolicy

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def model_dir(folder: Path) -> Path:
    """A folder with the right files; nothing in it is loaded here."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_a_directory_is_checked_file_by_file(tmp_path: Path) -> None:
    folder = model_dir(tmp_path / "model")
    assert resolve_model(str(folder)) == folder
    for name, reason in (
        ("config.json", "config.json is missing"),
        ("tokenizer.json", "tokenizer.json is missing"),
        ("model.safetensors", "model.safetensors is missing"),
    ):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(ModelError, match=reason):
            resolve_model(str(folder))
        (tmp_path / name).rename(folder / name)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    folder = model_dir(tmp_path / "model")
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
        resolve_model(str(folder))


def test_every_shard_of_split_weights_must_be_there(tmp_path: Path) -> None:
    folder = model_dir(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / shards["a"]).write_text("weights")
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        resolve_model(str(folder))
    (folder / shards["b"]).write_text(POINTER)
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: is a Git LFS pointer"):
        resolve_model(str(folder))
    (folder / shards["b"]).write_text("weights")
    assert resolve_model(str(folder)) == folder
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"is not a safetensors index"):
        resolve_model(str(folder))


def test_pickled_weights_are_not_read_and_the_message_says_what_to_do(tmp_path: Path) -> None:
    folder = model_dir(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"convert pytorch_model\.bin to safetensors"):
        resolve_model(str(folder))


def test_a_file_or_a_wrong_path_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("x")
    with pytest.raises(ModelError, match=r"is a file; name the directory"):
        resolve_model(str(file))
    with pytest.raises(ModelError, match=r"no such directory"):
        resolve_model(str(tmp_path / "absent"))


def test_hub_ids_are_found_in_the_cache_and_explained_offline(tmp_path: Path) -> None:
    # In a child, as the hub's client reads its environment when it is imported; offline, so that no socket is opened.
    snapshot = tmp_path / "hub" / "models--org--cached" / "snapshots" / "abc"
    model_dir(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    code = (
        "from pairloop.policy.engine import resolve_model\n"
        "from pairloop.errors import ModelError\n"
        "print(resolve_model('org/cached'))\n"
        "try:\n    resolve_model('org/absent')\nexcept ModelError as error:\n    print(error)\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    found, explained = done.stdout.strip().split("\n")
    assert Path(found) == snapshot
    assert explained.startswith("org/absent: no such directory here, not in the hub's cache")


def test_fake_opens_without_a_model_and_a_broken_model_does_not_open(tmp_path: Path) -> None:
    policy = open_policy(parse_config({"policy": {"model": "fake"}}))
    assert isinstance(policy, FakePolicy)
    policy.close()
    with pytest.raises(ModelError, match=r"cannot be read|no end-of-sequence"):
        open_policy(parse_config({"policy": {"model": str(model_dir(tmp_path / "broken"))}}))
