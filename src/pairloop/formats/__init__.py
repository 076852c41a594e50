"""Dataset rows in and out: one small file per family, strict validation, every bad row named at once.

``read_rows`` turns a file into labelled groups (``check_rows`` only says whether that will go, ``each_group`` yields them one
by one), ``write_rows`` turns pairs and groups into rows, and ``snapshot`` keeps pairs without losing a field. A new family is
one file and one entry of the table in ``registry``.
"""

from pairloop.formats.reader import CheckResult, ReadResult, check_rows, each_group, read_rows
from pairloop.formats.registry import FAMILIES
from pairloop.formats.writer import FORMATS, Rows, WriteResult, describe, write_rows

__all__ = [
    "FAMILIES",
    "FORMATS",
    "CheckResult",
    "ReadResult",
    "Rows",
    "WriteResult",
    "check_rows",
    "describe",
    "each_group",
    "read_rows",
    "write_rows",
]
