"""Deploy: put a version where it can answer, and move the aliases: by the gate, by hand, or back where a live guard breaks."""

from __future__ import annotations

from pairloop.loop.deploy.aliases import (
    end_canary,
    end_duel,
    known,
    open_duel,
    promote,
    promote_by_hand,
    retire,
    rollback,
)
from pairloop.loop.deploy.canary import (
    Standing,
    canary_standing,
    champion_standing,
    duel_standing,
    standing,
    start_canary,
    stop_canary,
)
from pairloop.loop.deploy.probe import PROBE_ANSWER, PROBE_PROMPT, load
from pairloop.loop.deploy.watch import Watch, evidence

__all__ = [
    "PROBE_ANSWER",
    "PROBE_PROMPT",
    "Standing",
    "Watch",
    "canary_standing",
    "champion_standing",
    "duel_standing",
    "end_canary",
    "end_duel",
    "evidence",
    "known",
    "load",
    "open_duel",
    "promote",
    "promote_by_hand",
    "retire",
    "rollback",
    "standing",
    "start_canary",
    "stop_canary",
]
