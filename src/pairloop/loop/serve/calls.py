"""The ids of tool calls: they hold the answer that made them, so a conversation that goes on names its predecessor by them."""

from __future__ import annotations

import base64
import binascii
from uuid import UUID

GROUP_PREFIX, CALL_PREFIX = "chatcmpl-", "call_"
MAX_CALLS = 256
"""Calls of one answer that have an id of their own."""


def call_id(group_id: str, index: int, place: int) -> str:
    """The id of call number ``place`` of completion ``index``; the same whenever it is asked for."""
    packed = UUID(group_id.removeprefix(GROUP_PREFIX)).bytes + bytes((index, place))
    return CALL_PREFIX + base64.urlsafe_b64encode(packed).decode()


def call_origin(tool_call_id: str) -> tuple[str, int] | None:
    """The group and index that made a call; None for an id that is not one of ours."""
    try:
        packed = base64.urlsafe_b64decode(tool_call_id.removeprefix(CALL_PREFIX).encode("ascii"))
    except (binascii.Error, ValueError):
        return None
    if len(packed) != 18 or not tool_call_id.startswith(CALL_PREFIX):
        return None
    return f"{GROUP_PREFIX}{UUID(bytes=packed[:16])}", packed[16]
