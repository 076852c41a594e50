"""How a challenger is judged: the offline report, then the gate."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pairloop.config.section import Positive, Section, Share

Requirement = Literal["sides", "adjusted_win_rate", "worst_slice", "verifier", "seed_duel", "heldout_accuracy", "suite"]
"""What ``gate.require`` may name."""


class EvaluateSection(Section):
    """The offline report before any traffic is spent."""

    prompts: int = Field(default=64, ge=8)
    """Recent prompts of the gate pool sampled from champion and challenger."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer of the offline report."""
    keep_samples: int = Field(default=6, ge=0, le=50)
    """So many prompts of the offline report are kept with what challenger and champion said, for the version's page. They are
    sampled anyway; each goes when the request that its prompt came from is erased, deleted or too old (``privacy``)."""
    suite: str | None = None
    """File of cases, from the state directory: JSON lines of ``messages`` and ``must_match``, ``must_not_match`` (regular
    expressions) or ``must_be_json``, which the greedy answer is checked against; ``name`` is what the report calls it."""


class GateSection(Section):
    """What a challenger must show (SCIENCE: mixture e-process on duel picks, then guardrails)."""

    alpha: float = Field(default=0.05, gt=0.0, lt=0.5)
    """Chance of promoting a challenger that is no better: per duel, or with ``spending = "lifetime"`` ever."""
    spending: Literal["duel", "lifetime"] = "duel"
    """``lifetime`` gives the r-th duel of a policy alpha · 6 / (π² r²), which adds up to alpha however many there are."""
    cluster: Literal["pick", "rater_day", "rater"] = "rater_day"
    """How picks of one rater count: ``rater_day`` the first decisive one of each UTC day; ``rater`` the first
    ``max_picks_per_rater`` together as one vote (for duels of several days among the same people, whose tastes differ);
    ``pick`` each of these as a vote of its own, which errs where people have tastes."""
    max_picks_per_rater: int = Field(default=6, ge=1)
    """Picks of one rater that a duel counts with ``cluster = "rater"`` or ``"pick"``."""
    robust: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The duel must be won without this share of raters, too, those most favourable to the challenger; 0.1 withstands a tenth
    of raters who collude."""
    min_picks: int = Field(default=50, ge=1)
    """Decisive picks before the gate says anything but CONTINUE."""
    min_raters: int = Field(default=30, ge=1)
    """Raters before the gate says anything but CONTINUE."""
    max_picks: int = Field(default=2_000, ge=1)
    """Picks after which an undecided duel is HOLD."""
    max_hours: Positive = 24.0
    """Hours after which an undecided duel is HOLD."""
    ties: Literal["drop", "half"] = "drop"
    """``drop`` ties, or count each as half a win and half a loss."""
    min_length_ratio: Positive = 0.7
    """Lower bound of the answer length over the champion's."""
    max_length_ratio: Positive = 1.4
    """Upper bound of the answer length over the champion's."""
    min_entropy_ratio: Share = 0.5
    """Lower bound of the entropy per answer over the base's."""
    max_kl_to_base: Positive = 50.0
    """Nats per completion."""
    max_bad_share: Share = 0.05
    """Points by which the share of truncated or empty answers may exceed the champion's."""
    max_verifier_drop: float = Field(default=0.05, ge=0.0)
    """What the verifier's mean score may lose to the champion's, in the verifier's own points."""
    min_seed_win_rate: Share = 0.5
    """Lower bound of the win rate against the base: by the verifier or judge on the offline report's samples where one is
    asked, else by raters in the live duel of ``seed_share``."""
    seed_share: float = Field(default=0.0, ge=0.0, le=0.5)
    """Share of the duel's requests that the challenger answers beside the base instead of the champion, for ``seed_duel``.
    Where the base is the champion, all of them are against the base anyway."""
    max_suite_lost: int = Field(default=0, ge=0)
    """Cases of ``evaluate.suite`` that the champion passes and the challenger may fail."""
    min_heldout_accuracy: Share = 0.5
    """Share of held-out pairs that the challenger must get right, with the champion as reference."""
    max_judge_flips: Share = 0.5
    """Share of comparisons in which a judge may contradict itself when the order is swapped; above, an offline duel is HOLD."""
    slices: tuple[str, ...] = ()
    """Keys of the requests' ``metadata`` by whose values the duel is looked at apart; a slice in which the champion is shown
    to be better is REJECT."""
    min_slice_picks: int = Field(default=30, ge=1)
    """Decisive votes from which a slice counts as looked at."""
    require: tuple[Requirement, ...] = ()
    """What must be shown besides the duel and the four limits above, else HOLD: ``sides`` (that they were a fair coin),
    ``adjusted_win_rate`` (a gain beyond side and length), ``worst_slice``, ``verifier``, ``seed_duel``, ``heldout_accuracy``,
    ``suite``.
    Without it these can stop a version where they are known, and are not missed where they are not."""
    offline_prompts: int = Field(default=400, ge=1)
    """Prompts of the offline duel where a verifier or judge labels and there is no traffic to duel on."""
    offline: bool = False
    """Duel offline, with the configured verifier or judge on held-out prompts, instead of on live traffic."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.min_picks > self.max_picks:
            raise ValueError("min_picks must not exceed max_picks")
        if self.min_length_ratio >= self.max_length_ratio:
            raise ValueError("min_length_ratio must be below max_length_ratio")
        return self

    @model_validator(mode="after")
    def _requirements_can_be_met(self) -> Self:
        if "worst_slice" in self.require and not self.slices:
            raise ValueError('require names "worst_slice", but slices names no metadata key: slices = ["language"], say')
        live = sorted({"sides", "adjusted_win_rate", "worst_slice"} & set(self.require))
        if self.offline and live:
            raise ValueError(f"an offline duel has no sides, raters or slices: take {', '.join(live)} out of require")
        if self.offline and self.seed_share:
            raise ValueError(
                "an offline duel has no requests to share: set seed_share = 0, the verifier or judge knows the base"
            )
        return self
