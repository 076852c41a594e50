"""Many rows in one statement: what a hundred requests wrote at once costs the database one round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from sqlalchemy import Connection, Dialect, Table

CHUNKS = (64, 16, 4, 1)
"""Rows per statement: few texts, so that the database keeps them compiled; SQLite takes 32,766 values."""

_Processor = Callable[[Any], Any]


class BulkInsert:
    """``INSERT`` of these columns of a table, as plain text with as many rows as come; the columns' types apply.

    ``known_stay``: a row whose key is there already is left as it is.
    """

    def __init__(self, table: Table, columns: Sequence[str], *, known_stay: bool = False) -> None:
        self._table = table
        self._columns = tuple(columns)
        self._tail = " ON CONFLICT DO NOTHING" if known_stay else ""
        self._prepared: dict[str, tuple[dict[int, str], list[tuple[int, _Processor]]]] = {}

    def __call__(self, c: Connection, rows: Sequence[Sequence[Any]]) -> None:
        """Write rows of values in the columns' order."""
        if c.dialect.name not in self._prepared:
            self._prepared[c.dialect.name] = self._texts(c.dialect), self._processors(c.dialect)
        texts, processors = self._prepared[c.dialect.name]
        values = [list(row) for row in rows]
        for row in values:
            for place, processor in processors:
                row[place] = processor(row[place])
        done = 0
        while done < len(values):
            size = next(size for size in CHUNKS if size <= len(values) - done)
            c.exec_driver_sql(texts[size], tuple(chain.from_iterable(values[done : done + size])))
            done += size

    def _texts(self, dialect: Dialect) -> dict[int, str]:
        quote = dialect.identifier_preparer.quote
        names = ", ".join(quote(name) for name in self._columns)
        row = f"({', '.join(['?' if dialect.paramstyle == 'qmark' else '%s'] * len(self._columns))})"
        head = f"INSERT INTO {quote(self._table.name)} ({names}) VALUES "
        return {size: head + ", ".join([row] * size) + self._tail for size in CHUNKS}

    def _processors(self, dialect: Dialect) -> list[tuple[int, _Processor]]:
        types = [self._table.c[name].type.dialect_impl(dialect) for name in self._columns]
        found = [type_.bind_processor(dialect) for type_ in types]
        return [(place, processor) for place, processor in enumerate(found) if processor is not None]
