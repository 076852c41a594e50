"""What this process last saw of a duel: for metrics, which must not count the votes anew each time that they are asked."""

from __future__ import annotations

from dataclasses import dataclass

from pairloop.types import Verdict


@dataclass(frozen=True, slots=True)
class LastLook:
    """The verdict of a look, which may be CONTINUE; that one is stored only once in a duel."""

    duel_id: str
    verdict: Verdict


_last: dict[str, LastLook] = {}


def remember(policy: str, duel_id: str, verdict: Verdict) -> None:
    _last[policy] = LastLook(duel_id, verdict)


def last_look(policy: str) -> LastLook | None:
    """None where this process has not looked at a duel of the policy."""
    return _last.get(policy)
