"""Where trackers that write files do so."""

from __future__ import annotations

from pathlib import Path

from pairloop.config import Config


def tracking_folder(config: Config) -> Path:
    """``track.folder``, else ``tracking`` in the state directory; made where it is missing."""
    folder = Path(config.track.folder) if config.track.folder else config.state_dir / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()
