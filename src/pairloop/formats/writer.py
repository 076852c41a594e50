"""Preference pairs out, as rows of any family that can hold a pair."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pairloop.errors import UserError
from pairloop.formats.registry import FAMILIES, family_named
from pairloop.types import PreferencePair


def write_pairs(path: Path, pairs: Iterable[PreferencePair], family: str = "openai") -> int:
    """Write one JSONL row per pair and return how many; UserError where the family holds no pairs, or not such a prompt.

    The file appears whole or not at all.
    """
    write = family_named(family).write
    if write is None:
        writable = ", ".join(known.name for known in FAMILIES.values() if known.write is not None)
        raise UserError(f"family {family!r} does not hold pairs; write one of {writable}")
    rows = [json.dumps(write(pair), ensure_ascii=False) for pair in pairs]
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", newline="\n")
    unfinished.replace(path)
    return len(rows)
