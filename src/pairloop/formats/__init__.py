"""Dataset rows in and out: one small file per family, strict validation, every bad row named at once.

``read_rows`` turns a file into labelled groups, ``write_pairs`` turns preference pairs into rows, and ``snapshot`` keeps
pairs without losing a field. A new family is one file and one entry of the table in ``registry``.
"""

from pairloop.formats.reader import ReadResult, read_rows
from pairloop.formats.registry import FAMILIES
from pairloop.formats.writer import write_pairs

__all__ = ["FAMILIES", "ReadResult", "read_rows", "write_pairs"]
