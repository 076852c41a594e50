"""Environment variables that look like settings of ours and are none: a misspelt one would be ignored without a word."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

logger = logging.getLogger("pairloop.config")

_NEAR = 0.8
"""How alike two names must be, by difflib's ratio; SERV_PORT and SERVE_PORT are so by .95."""
_OF_KUBERNETES = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
"""What it sets in every pod about a service named pairloop, or pairloop-something."""
_LINK = re.compile(r"(tcp|udp|sctp)://.*")
"""The value of its ``PAIRLOOP_PORT``."""
_told: set[str] = set()


def warn_of_strays(env: Mapping[str, str], known: Collection[str], data: Mapping[str, Any], *, prefix: str) -> None:
    """Log each misspelt variable with the name that it is near to, once a process. ``known``: the settings' variables;
    ``data``: the configuration, whose values may name variables that hold secrets."""
    named = set(_texts(data))
    for name, value in env.items():
        is_ours = name.startswith(prefix) and name not in known and name not in named and name not in _told
        if not is_ours or _OF_KUBERNETES.fullmatch(name) or _LINK.fullmatch(value):
            continue
        near = difflib.get_close_matches(name.removeprefix(prefix), [one.removeprefix(prefix) for one in known], 1, _NEAR)
        if near:
            _told.add(name)
            logger.warning("%s is no setting and is ignored; did you mean %s%s?", name, prefix, near[0])


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]
