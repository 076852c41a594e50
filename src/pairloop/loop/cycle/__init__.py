"""The cycle: the only place that knows the order of the stages. Resumable from the store after kill -9 at any point.

building → training → checking → duelling (→ canary) → promoted | held | rejected | nothing_to_train | failed. Each move is a
record, committed together with what it records, so a stage whose record exists is never run again. ``context`` holds what a
cycle works with and its lease, ``stages`` one function per state (``canary`` that one), ``base`` registers version 0,
``status`` tells where things stand.
Run alone: ``pairloop cycle run``.
"""

from pairloop.loop.cycle.base import ensure_base, register_base
from pairloop.loop.cycle.cancel import cancel
from pairloop.loop.cycle.context import Loop, is_gone, owning, standstill, training
from pairloop.loop.cycle.judging import AgainstBase, kept_against_base, standing
from pairloop.loop.cycle.looks import last_look
from pairloop.loop.cycle.review import Compared, Look, Review, last_word, review
from pairloop.loop.cycle.rounds import RoundStatus, round_of
from pairloop.loop.cycle.stages import record_failure, run
from pairloop.loop.cycle.status import (
    CanaryStatus,
    CycleStatus,
    DuelStatus,
    LastVerdict,
    challenger_of,
    next_run_at,
    run_json,
    runs_ahead,
    status,
)
from pairloop.loop.cycle.unloading import Unloader

__all__ = [
    "AgainstBase",
    "CanaryStatus",
    "Compared",
    "CycleStatus",
    "DuelStatus",
    "LastVerdict",
    "Look",
    "Loop",
    "Review",
    "RoundStatus",
    "Unloader",
    "cancel",
    "challenger_of",
    "ensure_base",
    "is_gone",
    "kept_against_base",
    "last_look",
    "last_word",
    "next_run_at",
    "owning",
    "record_failure",
    "register_base",
    "review",
    "round_of",
    "run",
    "run_json",
    "runs_ahead",
    "standing",
    "standstill",
    "status",
    "training",
]
