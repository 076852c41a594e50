"""What every section is made of: frozen, strict, its docstrings the documentation of its keys."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>s|m|h|d|w)")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def duration_s(text: str) -> float:
    """Seconds in a duration such as ``90s``, ``15m``, ``6h``, ``1d`` or ``2w``."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match["number"]) <= 0:
        raise ValueError(f"{text!r} is not a duration; write for example 90s, 15m, 6h, 1d or 2w")
    return float(match["number"]) * _UNIT_S[match["unit"]]


def is_loopback(host: str) -> bool:
    """Whether an address (or localhost) is one that only this machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
