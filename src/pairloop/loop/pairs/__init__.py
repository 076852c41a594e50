"""Pairs: labelled groups become one dataset snapshot of training rows, and every feedback row is accounted for.

``screen`` says which rows may speak, ``evidence`` what each kind of feedback says, ``builder`` lets the statements meet (merge,
conflict, cap, split) and ``rows`` makes of them what the objective learns from, all pure; ``fresh`` does it for the store's
new groups, ``staging`` in a process of its own where they are many, ``dataset`` publishes the hash-named folder, and ``file``
does it for a file of rows.
"""

from pairloop.loop.pairs.builder import compile_pairs
from pairloop.loop.pairs.dataset import PairCount, count_new, counted_new, record, run, set_aside_rows
from pairloop.loop.pairs.file import compile_file
from pairloop.loop.pairs.fresh import NewPairs, compile_new, promotions_between
from pairloop.loop.pairs.rows import compile_rows
from pairloop.loop.pairs.rules import Compiled, CompiledPairs, CompiledRows, Dropped, PairRules
from pairloop.loop.pairs.staging import Staged, near_or_apart, staged

__all__ = [
    "Compiled",
    "CompiledPairs",
    "CompiledRows",
    "Dropped",
    "NewPairs",
    "PairCount",
    "PairRules",
    "Staged",
    "compile_file",
    "compile_new",
    "compile_pairs",
    "compile_rows",
    "count_new",
    "counted_new",
    "near_or_apart",
    "promotions_between",
    "record",
    "run",
    "set_aside_rows",
    "staged",
]
