"""From the configuration to the place of the artifacts."""

from __future__ import annotations

from pairloop.config import Config
from pairloop.store.artifacts import Artifacts


def open_artifacts(config: Config) -> Artifacts:
    """The folder or the URL of ``store.artifacts``. Reaches nothing yet: see `Artifacts.reach`."""
    url, section = config.artifacts_url, config.store
    if url is None:
        return Artifacts(config.artifacts_dir)
    from pairloop.store.remote import RemoteArtifacts  # fsspec, and what it needs for the URL: only where there is one

    return RemoteArtifacts(
        config.artifacts_dir,
        url,
        section.artifacts_options,
        limit_bytes=int(section.artifacts_cache_gb * 1e9),
        held_most=2 * config.policy.max_loaded + 8,
        checkpoints=section.artifacts_checkpoints,
    )
