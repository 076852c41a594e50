"""The gate: report + duel votes + configuration → CONTINUE | PROMOTE | HOLD | REJECT, with a reason per rule.

``votes`` makes votes of picks, ``count`` says which of them count, ``decide`` gives the verdict; ``path`` how the evidence
grew, ``rules`` what each rule means; ``plan`` says beforehand how many picks a duel will take, by simulating it with the same
code.
"""

from __future__ import annotations

from pairloop.loop.gate.count import CHALLENGER, CHAMPION, Count, Tally, count
from pairloop.loop.gate.evidence import Staked, e_value, log_e_value, win_rate
from pairloop.loop.gate.path import Step, judged, path
from pairloop.loop.gate.plan import Crowd, Plan, plan, simulate
from pairloop.loop.gate.rails import OfflineReport, guardrails
from pairloop.loop.gate.rules import RULES, Rule, interval_of
from pairloop.loop.gate.seed import against_base
from pairloop.loop.gate.sides import BradleyTerry, bradley_terry, coin
from pairloop.loop.gate.slices import Slice, by_slice
from pairloop.loop.gate.verdict import decide, e_value_of, picks_to_go, spent
from pairloop.loop.gate.votes import votes

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "RULES",
    "BradleyTerry",
    "Count",
    "Crowd",
    "OfflineReport",
    "Plan",
    "Rule",
    "Slice",
    "Staked",
    "Step",
    "Tally",
    "against_base",
    "bradley_terry",
    "by_slice",
    "coin",
    "count",
    "decide",
    "e_value",
    "e_value_of",
    "guardrails",
    "interval_of",
    "judged",
    "log_e_value",
    "path",
    "picks_to_go",
    "plan",
    "simulate",
    "spent",
    "votes",
    "win_rate",
]
