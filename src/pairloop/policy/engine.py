"""From a configured model name to a policy: finds the directory, checks it file by file, and opens the engine for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pairloop.config import Config
from pairloop.errors import ModelError
from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import Fetch, Policy
from pairloop.starter import MODEL_DIR
from pairloop.template import is_lfs_pointer

FAKE_MODEL = "fake"
STARTER_MODEL = "starter"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.jinja"]


def open_policy(config: Config, *, fetch: Fetch = Path) -> Policy:
    """The engine of the configured model: `FakePolicy` for ``fake``, else ``policy.engine``'s. ModelError with the reason.

    ``fetch`` brings a version's folder here before it is read, where it lies elsewhere.
    """
    if config.policy.model == FAKE_MODEL:
        return FakePolicy(fetch=fetch)
    base_dir = resolve_model(config.policy.model)
    if config.policy.engine == "vllm":
        from pairloop.policy.remote.policy import open_remote

        return open_remote(config, base_dir, fetch=fetch)
    from pairloop.policy.local import LocalPolicy  # torch: only where a model is opened

    return LocalPolicy(base_dir, config.policy, max_context=config.serve.max_context, fetch=fetch)


def resolve_model(model: str) -> Path:
    """The checked directory of ``starter``, of a path, or of a hub id (fetched, or found in the hub's cache)."""
    if model == STARTER_MODEL:
        return check_model_dir(MODEL_DIR)
    path = Path(model).expanduser()
    if path.is_dir():
        return check_model_dir(path)
    if path.exists():
        raise ModelError(f"{model}: is a file; name the directory that holds config.json, model.safetensors and tokenizer.json")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model}: no such directory")
    return check_model_dir(_fetch(model))


def check_model_dir(path: Path) -> Path:
    """``path`` itself if it holds config, tokenizer and whole safetensors weights; else ModelError naming what is wrong."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: config.json is missing; this is not a Hugging Face model directory")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(f"{path}: tokenizer.json is missing; save the model's fast tokenizer beside its weights")
    check_weights(path)
    for name in ("config.json", "tokenizer.json"):
        _refuse_pointer(path / name)
    return path


def check_weights(path: Path) -> None:
    """ModelError unless all safetensors shards in ``path`` are there and are not Git LFS pointers."""
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        _refuse_pointer(index)
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: is not a safetensors index: {error}") from error
    for name in names:
        if not (path / name).is_file():
            hint = "; convert pytorch_model.bin to safetensors first" if list(path.glob("pytorch_model*.bin")) else ""
            raise ModelError(f"{path}: {name} is missing{hint}")
        _refuse_pointer(path / name)


def _refuse_pointer(path: Path) -> None:
    if is_lfs_pointer(path):
        raise ModelError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in that repository")


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except GatedRepoError as error:
        raise ModelError(f"{model}: access on the hub is restricted; accept its terms there and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{model}: neither a directory here nor a model on the hub; check the spelling") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{model}: no such directory here, not in the hub's cache, and the hub cannot be reached (offline); "
            "give the path of a model directory, or `starter`"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"{model}: cannot be fetched from the hub: {error}") from error
