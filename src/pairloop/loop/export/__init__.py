"""Export: a version as a folder (or one archive) for use elsewhere, with a model card of where it came from.

A PEFT adapter directory, or with ``merged`` a whole model directory: both are what transformers, PEFT and vLLM read as they
are. ``facts`` gathers what the store knows of a version, ``card`` writes it down for people, ``lineage`` for programs. Run
alone: ``pairloop versions export``.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pairloop.config import Config
from pairloop.errors import ArtifactError, BrokenVersionError, ModelError, NotFoundError, UserError
from pairloop.learner.files import whole_folder
from pairloop.learner.job import FAKE
from pairloop.loop.export.archive import Archive, Member, archive
from pairloop.loop.export.card import CARD_FILE, card, license_of
from pairloop.loop.export.facts import Facts, gather
from pairloop.loop.export.lineage import LINEAGE_FILE, lineage
from pairloop.policy.engine import STARTER_MODEL, resolve_model
from pairloop.store import Store, removed, versions
from pairloop.store.artifacts import MANIFEST
from pairloop.types import BASE_VERSION, Version, VersionKind

ADAPTER_CONFIG = "adapter_config.json"

__all__ = ["Archive", "Exported", "Lack", "lack_of", "license_of", "run", "stream"]


class Lack(StrEnum):
    """What is not there of a version that cannot be exported: its weights were removed on purpose, or files are missing."""

    MODEL = "model"
    TRAINING = "training"
    REMOVED = "removed"
    FILES = "files"


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

    UserError where ``out`` is in use or there is nothing to export, BrokenVersionError where the stored files are not what
    was published, NotFoundError where they were removed on purpose, ModelError where adapter and base cannot be merged.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; name a new folder for the exported version")
    found = _find(store, config, version, base_name)
    is_folded = version.kind is VersionKind.ADAPTER and merged
    form = "model" if is_folded else found.form
    with whole_folder(out) as folder:
        if is_folded:
            _merge(config, found.base_dir, found.source, folder)
        for member in found.words(form) if is_folded else found.members():
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(member.content, bytes):
                path.write_bytes(member.content)
            else:
                shutil.copyfile(member.content, path)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    return Exported(version.name, out, form, found.facts.base)


def stream(store: Store, config: Config, version: Version, *, base_name: str | None = None) -> Archive:
    """What `run` would write, unmerged, as an archive: nothing is written here, and no weights are read before they are sent.

    But every file is read once before, so that what is broken is said instead of sent. Errors as those of `run`.
    """
    found = _find(store, config, version, base_name)
    return archive(f"{version.policy}-{version.number}", found.members(), version.created_at)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is to be exported: the files at ``source``, which are whole, and what is told of them."""

    facts: Facts
    source: Path
    base_dir: Path

    @property
    def form(self) -> str:
        return "adapter" if self.facts.version.kind is VersionKind.ADAPTER else "model"

    def members(self) -> list[Member]:
        """The files as they are stored, an adapter's configuration naming its base, and the `words` about them."""
        form, found = self.form, list[Member]()
        for path in sorted(path for path in self.source.rglob("*") if path.is_file()):
            name = path.relative_to(self.source).as_posix()
            if name == ADAPTER_CONFIG and form == "adapter":
                found.append(Member(name, _naming_base(path, self.facts)))
            elif name not in (MANIFEST, CARD_FILE, LINEAGE_FILE):
                found.append(Member(name, path))
        return [*found, *self.words(form)]

    def words(self, form: str) -> list[Member]:
        """The model card, and the same for programs."""
        told = card(self.facts, form, self.base_dir).encode()
        return [Member(CARD_FILE, told), Member(LINEAGE_FILE, lineage(self.facts, form).encode())]


def _find(store: Store, config: Config, version: Version, base_name: str | None) -> _Found:
    model, lack = _base_of(store, config, version), _lack(store, config, version)
    if lack is Lack.MODEL:
        raise ModelError(f"{version.name}: the policy without a model has no weights to export")
    base_dir = resolve_model(model).resolve()
    if lack is Lack.TRAINING:
        raise UserError(f"{version.name} is the base model itself, which lies in {base_dir}; nothing was trained on it")
    if lack is Lack.REMOVED:
        again = f"`pairloop rebuild {version.number}` makes it again"
        raise NotFoundError(f"the weights of {version.name} were removed (privacy.keep_versions); {again}", param="version")
    try:
        store.artifacts.verify(version.artifact_hash)
        source = store.artifacts.hold(version.path)
    except ArtifactError as error:
        raise BrokenVersionError(
            f"{version.name} cannot be exported: {error.told}; it is no longer what was published. `pairloop doctor` lists all "
            "that is broken, and with --repair --from BACKUP brings it back"
        ) from error
    return _Found(gather(store, version, base_name or _name_of_base(model, base_dir)), source, base_dir)


def lack_of(store: Store, config: Config, version: Version) -> Lack | None:
    """Why `stream` has nothing to send; None where it has. Looks at names and sizes, and at nothing that is far away."""
    lack = _lack(store, config, version)
    if lack is None and not store.artifacts.is_far and not store.artifacts.is_whole(version.artifact_hash):
        return Lack.FILES
    return lack


def _lack(store: Store, config: Config, version: Version) -> Lack | None:
    if _base_of(store, config, version) == FAKE:
        return Lack.MODEL
    if version.kind is VersionKind.BASE:
        return Lack.TRAINING
    with store.reading() as c:
        return Lack.REMOVED if removed.is_removed(c, version.path) else None


def _merge(config: Config, base_dir: Path, source: Path, folder: Path) -> None:
    from pairloop.learner.merge import merge  # torch: only where weights are folded

    policy = config.policy
    merge(base_dir, source, folder, dtype=policy.dtype, quantization=policy.quantization)


def _naming_base(path: Path, facts: Facts) -> bytes:
    """The adapter's configuration, saying which base it belongs to: PEFT loads that one by itself."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = facts.base
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


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
