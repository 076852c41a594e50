"""Ids: UUIDv7, so that they sort by time, with their noun in front."""

from __future__ import annotations

from uuid_utils import uuid7


def new_id(noun: str) -> str:
    """A new id such as ``feedback_0192...`` for the given noun."""
    return f"{noun}_{uuid7().hex}"


def new_wire_id(prefix: str) -> str:
    """A new id in the form that clients of OpenAI know, such as ``file-0192...`` for the prefix ``file-``."""
    return f"{prefix}{uuid7().hex}"


def new_group_id() -> str:
    """A new group id; it is also the ``id`` of the chat completion that the client sees."""
    return f"chatcmpl-{uuid7()}"
