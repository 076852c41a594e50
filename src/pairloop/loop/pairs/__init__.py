"""Pairs: labelled groups become one dataset snapshot of preference pairs, and every feedback row is accounted for.

``screen`` says which rows may speak, ``evidence`` what each kind of feedback says, ``builder`` lets the statements meet (merge,
conflict, cap, split), all pure; ``dataset`` does it for the store's new groups and writes the hash-named folder.
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
)
from pairloop.loop.pairs.rules import CompiledPairs, Dropped, PairRules

__all__ = [
    "CompiledPairs",
    "Dropped",
    "NewPairs",
    "PairRules",
    "compile_new",
    "compile_pairs",
    "count_new",
    "promotions_between",
    "record",
    "run",
    "set_aside_rows",
]
