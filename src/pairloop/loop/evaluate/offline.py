"""The offline duel, in place of live traffic where there is none.

The configured verifier or judge compares one sample each of champion and challenger on each held-out prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pairloop.config import Config
from pairloop.judge import messages_of
from pairloop.loop.evaluate import labeller
from pairloop.loop.evaluate.labeller import MAX_LABELLER_ERRORS, LabellerFailed
from pairloop.loop.evaluate.sampling import sample
from pairloop.policy.protocols import Policy
from pairloop.statistics import percent
from pairloop.store import Store, groups
from pairloop.types import DuelPick, Pool, Reason, Version


@dataclass(frozen=True, slots=True)
class OfflineDuel:
    """One vote per held-out prompt; prompts on which the labeller failed are counted apart and are no ties.

    ``flips``: prompts on which a judge contradicted itself when the order was swapped, which are ties; None for a verifier.
    """

    picks: tuple[DuelPick, ...]
    prompts: int
    errors: int
    labeller: str
    first_error: str | None = None
    flips: int | None = None

    def problems(self, max_flips: float) -> tuple[Reason, ...]:
        """The gate's rules on the labeller, as far as there is something to tell; open, which holds, where one is broken."""
        return tuple(reason for reason in (self._failed(), self._flipped(max_flips)) if reason is not None)

    def _failed(self) -> Reason | None:
        if not self.errors:
            return None
        share = self.errors / self.prompts
        is_too_much = share > MAX_LABELLER_ERRORS
        text = f"{self.labeller} failed on {self.errors} of {self.prompts} prompts, {'above' if is_too_much else 'within'} "
        text += f"{percent(MAX_LABELLER_ERRORS)}" + (": an error is HOLD, never PROMOTE" if is_too_much else "")
        text += f" (the first: {self.first_error})"
        return Reason("labeller_errors", None if is_too_much else True, text, share, MAX_LABELLER_ERRORS)

    def _flipped(self, limit: float) -> Reason | None:
        if self.flips is None or not self.picks:
            return None
        share = self.flips / len(self.picks)
        text = f"{self.labeller} contradicted itself on {self.flips} of {len(self.picks)} prompts when the order was swapped, "
        text += f"{'more than' if share > limit else 'within'} {percent(limit)}; these are ties"
        return Reason("judge_flips", None if share > limit else True, text, share, limit)

    def as_json(self) -> dict[str, Any]:
        wins = sum(pick.outcome == 1 for pick in self.picks)
        losses = sum(pick.outcome == -1 for pick in self.picks)
        return {
            "labeller": self.labeller,
            "prompts": self.prompts,
            "wins": wins,
            "losses": losses,
            "ties": len(self.picks) - wins - losses,
            "flips": self.flips,
            "errors": self.errors,
            "first_error": self.first_error,
        }


def offline_duel(store: Store, policy: Policy, config: Config, *, challenger: Version, champion: Version) -> OfflineDuel:
    """Votes of the configured verifier or judge, one per recent prompt of the gate pool; UserError where none is configured."""
    with store.reading() as c:
        prompts = groups.recent_prompts(c, config.policy.name, pool=Pool.GATE, limit=config.gate.offline_prompts)
    old, new = (sample(policy, config, prompts, version, role="duel") for version in (champion, challenger))
    started = datetime.now(UTC)
    picks: list[DuelPick] = []
    problems: list[str] = []
    flips = 0
    with labeller.configured(config.label) as judge:
        for i, (group, theirs, ours) in enumerate(zip(prompts, old, new, strict=True)):
            try:
                same = theirs.text == ours.text
                found = labeller.Compared(0) if same else judge.compare(messages_of(group.prompt), theirs.text, ours.text)
            except LabellerFailed as failure:
                problems.append(str(failure))
                continue
            flips += found.flipped
            picks.append(DuelPick(group.group_id, found.outcome, started + timedelta(microseconds=i)))
    first = problems[0] if problems else None
    return OfflineDuel(tuple(picks), len(prompts), len(problems), judge.name, first, flips if judge.score is None else None)
