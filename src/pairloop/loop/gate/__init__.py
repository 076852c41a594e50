"""The gate: report + duel votes + configuration → CONTINUE | PROMOTE | HOLD | REJECT, with a reason per rule.

``votes`` makes votes of picks, ``count`` says which of them count, ``decide`` gives the verdict; ``plan`` says beforehand how
many picks a duel will take, by simulating it with the same code.
"""

from __future__ import annotations

from pairloop.loop.gate.count import CHALLENGER, CHAMPION, Count, Tally, count
from pairloop.loop.gate.evidence import Staked, e_value, log_e_value, win_rate
from pairloop.loop.gate.plan import Crowd, Plan, plan, simulate
from pairloop.loop.gate.rails import OfflineReport, guardrails
from pairloop.loop.gate.seed import against_base
from pairloop.loop.gate.sides import bradley_terry, coin
from pairloop.loop.gate.verdict import decide, e_value_of, picks_to_go, spent
from pairloop.loop.gate.votes import votes

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "Count",
    "Crowd",
    "OfflineReport",
    "Plan",
    "Staked",
    "Tally",
    "against_base",
    "bradley_terry",
    "coin",
    "count",
    "decide",
    "e_value",
    "e_value_of",
    "guardrails",
    "log_e_value",
    "picks_to_go",
    "plan",
    "simulate",
    "spent",
    "votes",
    "win_rate",
]
