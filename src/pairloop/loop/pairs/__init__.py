"""Pairs: labelled groups become one dataset snapshot of training rows, and every feedback row is accounted for.

``screen`` says which rows may speak, ``evidence`` what each kind of feedback says, ``builder`` lets the statements meet (merge,
conflict, cap, split) and ``rows`` makes of them what the objective learns from, all pure; ``dataset`` does it for the store's
new groups and writes the hash-named folder, ``file`` for a file of rows.
"""

from pairloop.loop.pairs.builder import compile_pairs
from pairloop.loop.pairs.dataset import (
    NewPairs,
    compile_new,
    count_new,
    promotions_between,
    record,
    run,
    set_aside_rows,
    why_set_aside,
)
from pairloop.loop.pairs.file import compile_file
from pairloop.loop.pairs.rows import compile_rows
from pairloop.loop.pairs.rules import Compiled, CompiledPairs, CompiledRows, Dropped, PairRules

__all__ = [
    "Compiled",
    "CompiledPairs",
    "CompiledRows",
    "Dropped",
    "NewPairs",
    "PairRules",
    "compile_file",
    "compile_new",
    "compile_pairs",
    "compile_rows",
    "count_new",
    "promotions_between",
    "record",
    "run",
    "set_aside_rows",
    "why_set_aside",
]
