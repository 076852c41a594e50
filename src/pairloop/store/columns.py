"""Column types: UTC times as sortable text, token ids and log-probs as packed bytes, enums as their values."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Dialect, LargeBinary, String, Text
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware datetime as ``YYYY-MM-DDTHH:MM:SS.ffffffZ``: fixed width, so that text order is time order.

    Text, because SQLite has no time type, and what a person reads in the file should be what the API says.
    """

    impl = String(27)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no timezone; times are UTC and aware")
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else datetime.fromisoformat(value)


class _Packed(TypeDecorator[tuple[Any, ...]]):
    """A tuple of numbers as little-endian 4-byte items: a fifth of JSON's size, and exact."""

    impl = LargeBinary
    cache_ok = True
    item = "i"

    def process_bind_param(self, value: Sequence[Any] | None, dialect: Dialect) -> bytes | None:  # noqa: ARG002
        return None if value is None else struct.pack(f"<{len(value)}{self.item}", *value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> tuple[Any, ...] | None:  # noqa: ARG002
        return None if value is None else struct.unpack(f"<{len(value) // 4}{self.item}", value)


class TokenIds(_Packed):
    """Token ids as int32."""

    cache_ok = True
    item = "i"


class LogProbs(_Packed):
    """Log-probs as float32, which is what the engines record."""

    cache_ok = True
    item = "f"


_encode = json.JSONEncoder(allow_nan=False).encode


def dump_json(value: Any) -> str:
    """Strict JSON. Postgres refuses NaN and Infinity, so a non-finite metric of a run becomes null: the row is not lost."""
    try:
        return _encode(value)
    except ValueError:
        return _encode(_finite(value))


class JsonText(TypeDecorator[Any]):
    """A JSON scalar as text. SQLite gives a JSON column numeric affinity, which turns a stored 0.0 into 0."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else dump_json(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> Any:  # noqa: ARG002
        return None if value is None else json.loads(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
