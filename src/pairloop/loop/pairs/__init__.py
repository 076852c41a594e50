"""Pairs: labelled groups become one dataset snapshot of preference pairs, and every feedback row is accounted for.

``evidence`` reads what each kind of feedback says, ``builder`` lets the statements meet (merge, conflict, cap, split), both
pure; ``snapshot`` does it for the store's new groups and writes the hash-named folder.
"""

from pairloop.loop.pairs.builder import compile_pairs
from pairloop.loop.pairs.rules import CompiledPairs, Dropped, PairRules

__all__ = ["CompiledPairs", "Dropped", "PairRules", "compile_pairs"]
