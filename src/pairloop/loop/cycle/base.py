"""Version 0: registered once, and recognised again at each start."""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import ConfigError, PairloopError
from pairloop.policy.engine import FAKE_MODEL, resolve_model
from pairloop.policy.protocols import Policy
from pairloop.store import Store, versions
from pairloop.types import BASE_VERSION, Alias, Version, VersionKind

logger = logging.getLogger(__name__)

_MODEL_FILES = (".json", ".jinja", ".model", ".safetensors")
_WHOLE_BELOW = 64 << 20
_SAMPLED = 1 << 20


def ensure_base(store: Store, policy: Policy, config: Config) -> Version:
    """Version 0 of the configured policy, registered and made champion on the first start; what its aliases name is loaded,
    with the former champions that are kept warm, so that nothing is loaded when the first request comes.

    ConfigError where the policy was begun on another base model, or with another training method.
    """
    base = register_base(store, config)
    policy.load(base)
    for version in _aliased(store, config):
        policy.load(version)
    _warm_up(store, policy, config)
    return base


def _warm_up(store: Store, policy: Policy, config: Config) -> None:
    """Load the former champions that are kept warm; one that cannot be loaded is told, and nothing waits for it."""
    with store.reading() as c:
        numbers = versions.forerunners(c, config.policy.name, config.keep_warm)
        found = [version for number in numbers if (version := versions.get(c, config.policy.name, number)) is not None]
    for version in found:
        try:
            policy.load(version)
        except PairloopError as error:
            logger.warning("%s cannot be kept warm: %s", version.name, error)


def register_base(store: Store, config: Config) -> Version:
    """Version 0 of the configured policy, written on the first call; ConfigError where it was begun on another base model."""
    name = config.policy.name
    path, fingerprint = _identity(config.policy.model)

    def register(c: Connection) -> Version:
        known = versions.get(c, name, BASE_VERSION)
        if known is not None:
            return known
        base = Version(
            policy=name,
            number=BASE_VERSION,
            kind=VersionKind.BASE,
            path=path,
            artifact_hash=fingerprint,
            parent=None,
            dataset_id=None,
            run_id=None,
            created_at=datetime.now(UTC),
        )
        versions.insert(c, base)
        versions.set_alias(c, name, Alias.CHAMPION, BASE_VERSION)
        return base

    base = store.write(register)
    if base.artifact_hash != fingerprint:
        raise ConfigError(
            f"policy.model: {config.policy.model!r} is not the model that policy {name!r} was begun on ({base.path}). "
            "Its versions fit that base only: set policy.model back, or begin a new policy.name on the new model"
        )
    return base


def _aliased(store: Store, config: Config) -> list[Version]:
    """Champion, challenger and canary, checked against the configured training method."""
    name = config.policy.name
    with store.reading() as c:
        numbers = dict.fromkeys(versions.aliases_of(c, name).values())
        found = [version for number in numbers if (version := versions.get(c, name, number)) is not None]
    expected = VersionKind.ADAPTER if config.policy.method == "lora" else VersionKind.FULL
    for version in found:
        if version.number != BASE_VERSION and version.kind is not expected:
            raise ConfigError(
                f"policy.method: {config.policy.method!r} does not fit {version.name}, which is of kind {version.kind}. The "
                "method is fixed per policy: set it back, or begin a new policy.name"
            )
    return found


def _identity(model: str) -> tuple[str, str]:
    """Where the base model lies, and a fingerprint of its files: names, sizes and contents.

    Of files above 64 MiB the first and last MiB count, so that a start stays quick.
    """
    if model == FAKE_MODEL:
        return FAKE_MODEL, hashlib.sha256(FAKE_MODEL.encode()).hexdigest()
    folder = resolve_model(model).resolve()
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _MODEL_FILES):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(_content(file))
    return str(folder), digest.hexdigest()


def _content(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE_BELOW:
            return hashlib.file_digest(stream, "sha256").digest()
        ends = hashlib.sha256(stream.read(_SAMPLED))
        stream.seek(size - _SAMPLED)
        ends.update(stream.read(_SAMPLED))
        return ends.digest()
