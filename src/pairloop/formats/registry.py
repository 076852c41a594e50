"""The table of families, and which of them a row belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairloop.errors import UserError
from pairloop.formats import (
    candidates,
    comparisons,
    conversations,
    open_webui,
    openai,
    openai_stored,
    picks,
    prompts,
    ranking,
    rejected_message,
    responses,
    samples,
    scored,
    sft,
    thumbs,
    trl,
)
from pairloop.formats.family import Family

_ORDER = (
    openai,
    responses,
    comparisons,
    picks,
    rejected_message,
    candidates,
    samples,
    scored,
    openai_stored,
    open_webui,
    thumbs,
    trl,
    ranking,
    conversations,
    sft,
    prompts,
)

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _ORDER}
"""By name, in the order in which a row's keys are looked at: a conversation alone, which many rows hold, comes last."""


def family_named(name: str) -> Family:
    """The family; UserError that lists the known ones where there is none of that name."""
    if name not in FAMILIES:
        raise UserError(f"unknown row family {name!r}; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def detect(row: Mapping[str, Any]) -> Family | None:
    """The first family whose keys this row has."""
    return next((family for family in FAMILIES.values() if family.matches(row)), None)
