"""Where artifacts lie: a folder of this machine, or a URL that several machines share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SECRETS = re.compile(r"(^|_)(key|secret|token|password|passwd|credentials?|connection_string|username)$|secret", re.IGNORECASE)
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs"}
"""What must be installed for a scheme: the package of our extra ``s3``. Of other schemes fsspec says what it lacks."""


def folder_of(place: str) -> Path | None:
    """The folder that ``place`` names, as a path or a ``file://`` URL; None where it is the URL of something else."""
    if not _URL.match(place):
        return Path(place)
    parts = urlsplit(place)
    if parts.scheme.lower() != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"artifacts: {place} names the host {parts.netloc!r}: a folder of this machine is file:///path")
    return Path(unquote(parts.path))


def check_place(place: str | None, options: Mapping[str, Any]) -> None:
    """ValueError where artifacts cannot lie there, or where a secret stands in the configuration."""
    if place is None or folder_of(place) is not None:
        if options:
            raise ValueError('artifacts_options are for a URL: set artifacts to one, such as "s3://bucket/pairloop"')
        return
    parts = urlsplit(place)
    if "@" in parts.netloc or parts.query:
        raise ValueError("artifacts: a URL without user, password or query: credentials come from the environment")
    if not parts.netloc and parts.scheme.lower() != "memory":
        raise ValueError(f'artifacts: {place} names no bucket or host, as in "s3://bucket/pairloop"')
    for name in _names(options):
        if _SECRETS.search(name):
            raise ValueError(f"artifacts_options.{name}: is a secret; leave it to the environment (S3: AWS_ACCESS_KEY_ID, …)")
    package = _EXTRAS.get(parts.scheme.lower())
    if package is not None and find_spec(package) is None:
        raise ValueError(f'artifacts: {place} needs {package}: pip install "pairloop[s3]"')


def _names(options: Mapping[str, Any]) -> list[str]:
    """All keys, those of inner tables too."""
    inner = [name for value in options.values() if isinstance(value, Mapping) for name in _names(value)]
    return [*options, *inner]
