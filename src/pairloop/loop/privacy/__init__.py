"""Privacy: people are erased, versions are made again without them, and texts go when they are old enough.

``erase`` is about a person (or one stored completion), ``ledger`` remembers it outside of the database, ``cleaning`` makes a
dataset without some of its rows, ``rebuild`` trains a version again from its manifest, ``retention`` erases by age.
"""

from pairloop.loop.privacy.erase import Effect, delete_completion, erase, preview, reapply
from pairloop.loop.privacy.ledger import Entry, entry_of, path_of, read
from pairloop.loop.privacy.people import ids_of, person_of
from pairloop.loop.privacy.rebuild import Rebuilt, rebuild
from pairloop.loop.privacy.retention import Swept, due, sweep

__all__ = [
    "Effect",
    "Entry",
    "Rebuilt",
    "Swept",
    "delete_completion",
    "due",
    "entry_of",
    "erase",
    "ids_of",
    "path_of",
    "person_of",
    "preview",
    "read",
    "reapply",
    "rebuild",
    "sweep",
]
