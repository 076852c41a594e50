"""Export: a version as a folder for use elsewhere, with a model card of where it came from.

A PEFT adapter directory, or with ``merged`` a whole model directory: both are what transformers, PEFT and vLLM read as they
are. ``facts`` gathers what the store knows of a version, ``card`` writes it down. Run alone: ``pairloop versions export``.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pairloop.config import Config
from pairloop.errors import ModelError, NotFoundError, UserError
from pairloop.learner.files import whole_folder
from pairloop.learner.job import FAKE
from pairloop.loop.export.card import CARD_FILE, card, license_of
from pairloop.loop.export.facts import Facts, gather
from pairloop.policy.engine import STARTER_MODEL, resolve_model
from pairloop.store import Store, versions
from pairloop.store.artifacts import MANIFEST
from pairloop.types import BASE_VERSION, Version, VersionKind

ADAPTER_CONFIG = "adapter_config.json"

__all__ = ["Exported", "license_of", "run"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. ``form``: ``adapter`` (PEFT), or ``model`` (all weights, with configuration and tokenizer)."""

    version: str
    path: Path
    form: str
    base_model: str


def run(
    store: Store, config: Config, version: Version, out: Path, *, merged: bool = False, base_name: str | None = None
) -> Exported:
    """Write ``version`` to ``out``, whole or not at all. ``base_name``: how files and card call the base model.

    UserError where ``out`` is in use or there is nothing to export, StoreError where the stored files are not what was
    published, ModelError where adapter and base cannot be merged.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; name a new folder for the exported version")
    model = _base_of(store, config, version)
    if model == FAKE:
        raise ModelError(f"{version.name}: the policy without a model has no weights to export")
    base_dir = resolve_model(model).resolve()
    if version.kind is VersionKind.BASE:
        raise UserError(f"{version.name} is the base model itself, which lies in {base_dir}; nothing was trained on it")
    store.artifacts.verify(version.artifact_hash)
    source = store.artifacts.hold(version.path)
    facts = gather(store, version, base_name or _name_of_base(model, base_dir))
    form = "adapter" if version.kind is VersionKind.ADAPTER and not merged else "model"
    with whole_folder(out) as folder:
        if version.kind is VersionKind.ADAPTER and merged:
            _merge(config, base_dir, source, folder)
        else:
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        if form == "adapter":
            _name_base(folder / ADAPTER_CONFIG, facts)
        (folder / CARD_FILE).write_text(card(facts, form, base_dir), encoding="utf-8")
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    return Exported(version.name, out, form, facts.base)


def _merge(config: Config, base_dir: Path, source: Path, folder: Path) -> None:
    from pairloop.learner.merge import merge  # torch: only where weights are folded

    policy = config.policy
    merge(base_dir, source, folder, dtype=policy.dtype, quantization=policy.quantization)


def _name_base(path: Path, facts: Facts) -> None:
    """The adapter says which base it belongs to: PEFT loads that one by itself."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = facts.base
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _base_of(store: Store, config: Config, version: Version) -> str:
    """The base model: the configured one, or of another policy what its version 0 names."""
    if version.policy == config.policy.name:
        return config.policy.model
    with store.reading() as c:
        base = versions.get(c, version.policy, BASE_VERSION)
    if base is None:
        raise NotFoundError(f"{version.policy} has no version 0, which would name its base", param="version")
    return base.path


def _name_of_base(model: str, base_dir: Path) -> str:
    """A hub id as it was configured; any other base by its folder, from which it can be loaded."""
    return str(base_dir) if model == STARTER_MODEL or Path(model).expanduser().is_dir() else model
