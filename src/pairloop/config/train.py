"""The training section: one round, its objective, and when it stops."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pairloop.config.section import Positive, Section, Share

ObjectiveName = Literal[
    "dpo",
    "cdpo",
    "rdpo",
    "ipo",
    "dpo_norm",
    "ld_dpo",
    "dpop",
    "dpo_nll",
    "simpo",
    "orpo",
    "kto",
    "grpo",
    "rloo",
    "dr_grpo",
    "dapo",
    "sft",
]

_STALE = {"importance", "max_importance"}
_PAIRS = _STALE | {"nll_weight"}
_RATIOS = {"length_normalized", "token_clip"}
_DPO = _PAIRS | _RATIOS | {"label_smoothing"}
READ_BY: dict[str, set[str]] = {
    "dpo": _DPO,
    "cdpo": _DPO,
    "rdpo": _DPO,
    "ipo": _DPO - {"label_smoothing"},
    "dpo_norm": _DPO - {"length_normalized"},
    "ld_dpo": _DPO | {"ld_alpha"},
    "dpop": _DPO | {"dpop_weight"},
    "dpo_nll": _DPO,
    "simpo": _PAIRS | {"label_smoothing", "simpo_margin"},
    "orpo": _STALE,
    "kto": _STALE | _RATIOS | {"desirable_weight", "undesirable_weight"},
    "grpo": _STALE | {"advantage_std", "loss_mean", "clip_low", "clip_high", "kl_weight"},
    "rloo": _STALE | {"kl_weight"},
    "dr_grpo": _STALE | {"clip_low", "clip_high", "kl_weight"},
    "dapo": _STALE | {"clip_low", "advantage_std"},
}
"""Which options each objective reads; ``beta`` scales the reported rewards of all. ``sft`` is not named: as the control it
takes the place of any objective, under that one's settings."""
OPTIONS = frozenset().union(*READ_BY.values())


RECIPE: Mapping[str, Any] = MappingProxyType({"beta": 0.3, "nll_weight": 1.0, "epochs": 4})
"""The default recipe of a round: what `pairloop init` writes for a model of one's own, and what the lab measures as ``recipe``.

Chosen on two of the lab's tasks and judged on the others (docs/science.md, R13).
"""


class TrainSection(Section):
    """One training round."""

    objective: ObjectiveName = "dpo"
    """What is learned. From pairs: ``dpo``, ``cdpo``, ``rdpo``, ``ipo``, ``dpo_norm``, ``ld_dpo``, ``dpop``, ``dpo_nll``,
    ``simpo``, ``orpo``. From groups of any size (a pair is a group of two with rewards 1 and 0): ``kto``, ``grpo``, ``rloo``,
    ``dr_grpo``, ``dapo``. From demonstrations, and as the control from chosen answers alone: ``sft``."""
    beta: float = Field(default=0.1, gt=0.0, le=10.0)
    """How strongly a margin is asked for (DPO's beta, IPO's tau, ORPO's lambda)."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen answers' mean negative log-likelihood, which holds them up while margins grow."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs expected to be labelled the wrong way round (cDPO): about .1 for people, 0 for verifiers."""
    measured_smoothing: bool = False
    """In a cycle, take ``label_smoothing`` from the measured flip rate of picks, once 30 comparisons were shown twice, sides
    swapped (``feedback.repeat_share``); until then, and elsewhere, it is as set."""
    length_normalized: bool = False
    """Divide each answer's log-ratio by its length in tokens: for long answers."""
    token_clip: float = Field(default=0.0, ge=0.0)
    """Largest log-ratio of one token to the reference, in nats; what goes beyond has no gradient; 0 sets no bound."""
    importance: Literal["none", "sequence"] = "none"
    """``sequence`` weighs pairs by policy over sampler, so that what the policy would no longer say counts less."""
    max_importance: float = Field(default=2.0, ge=1.0)
    """Largest of these weights."""
    ld_alpha: Share = 0.5
    """``ld_dpo``: how much the tokens beyond the shorter answer's length count."""
    dpop_weight: float = Field(default=5.0, ge=0.0)
    """``dpop``: price of a chosen answer that lost likelihood."""
    simpo_margin: float = Field(default=0.5, ge=0.0)
    """``simpo``: the margin asked for (gamma)."""
    desirable_weight: float = Field(default=1.0, ge=0.0)
    """``kto``: weight of the answers that people liked."""
    undesirable_weight: float = Field(default=1.0, ge=0.0)
    """``kto``: weight of the answers that they did not."""
    clip_low: Share = 0.2
    """``grpo`` and its kin: a token's policy over sampler is clipped below 1 minus this."""
    clip_high: float = Field(default=0.2, ge=0.0)
    """``grpo`` and ``dr_grpo``: it is clipped above 1 plus this (``dapo`` has its own .28)."""
    kl_weight: float = Field(default=0.0, ge=0.0)
    """``grpo``, ``dr_grpo`` and ``rloo``: weight of the KL to the reference."""
    advantage_std: Literal["population", "sample", "none"] = "population"
    """``grpo`` and ``dapo``: standard deviation that a group's rewards are divided by."""
    loss_mean: Literal["sequence", "sum", "tokens"] = "sequence"
    """``grpo``: mean over each answer's tokens, their sum, or mean over all tokens of the batch."""
    learning_rate: Positive = 1e-5
    """Peak learning rate of AdamW; 5e-6 to 2e-5 for LoRA on billions of parameters."""
    batch_size: int = Field(default=16, ge=1)
    """Rows (pairs, demonstrations, scored groups) per optimizer step."""
    max_tokens_per_batch: int = Field(default=4_096, ge=0)
    """Tokens of one forward pass, prompts and answers, each prompt counted once: a batch of more is read in parts whose
    gradients add up to its own. A group of more stands alone; 0 takes the whole batch at once. Where memory runs out it is
    halved, once."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """How packed rows attend on CUDA: ``flex`` compiles one FlexAttention kernel, for long rows of many answers."""
    gradient_checkpointing: bool = False
    """Keep each layer's input only and compute the rest again in the backward pass: less memory for about a third more time."""
    epochs: int = Field(default=1, ge=1, le=50)
    """Passes over the rows."""
    warmup_steps: int = Field(default=4, ge=0)
    """Steps of linear warm-up."""
    final_lr_share: Share = 0.1
    """Share of the peak at which the linear decay ends."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's two moments."""
    adam_eps: Positive = 1e-8
    """AdamW's epsilon."""
    clip_norm: Positive = 1.0
    """Largest gradient norm."""
    max_length: int = Field(default=2_048, ge=2)
    """Longest prompt plus completion in tokens; longer rows are refused with the reason ``over_long``."""
    min_pairs: int = Field(default=8, ge=1)
    """Fewer usable rows than this end the round as ``nothing_to_train``."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints; a killed run goes on from the last one, exactly. One that is asked to end writes one first."""
    stop_ess: Share = 0.0
    """Stop the round when the effective sample size of the policy against its sampler falls below this; 0 never stops."""
    warn_ess: Share = 0.8
    """Warn once when it falls below this: old pairs then say less and less about the policy as it is."""
    min_length_ratio: Share = 0.8
    """Stop when answers become shorter than this share of the sampler's, as estimated from the round's own; 0 never stops."""
    max_length_ratio: float = Field(default=1.25, ge=0.0)
    """Stop when they become longer than this many times the sampler's; 0 never stops."""
    min_entropy_ratio: Share = 0.5
    """Stop when the entropy of an answer falls below this share of the sampler's; 0 never stops."""
    heldout_every: int = Field(default=16, ge=0)
    """Steps between looks at the newest held-out rows, which cost about three steps each; 0 looks before and after only."""
    stop_heldout_rises: int = Field(default=2, ge=0)
    """Stop when the held-out loss (of pairs: the pair loss, whatever the objective) rose in this many looks in a row, and take
    the weights of its lowest; 0 never stops."""
    stop_d_chosen_falls: int = Field(default=2, ge=0)
    """Stop when the held-out chosen answers lost likelihood in this many looks in a row, and more than ``max_d_chosen_loss``
    in all; 0 never stops."""
    max_d_chosen_loss: float = Field(default=0.1, ge=0.0)
    """Nats per token that held-out chosen answers may lose against the reference before that counts: a small loss is usual in
    rounds that are promoted."""
    reference_check: int = Field(default=64, ge=0)
    """Recorded completions scored by the trainer before step 1, token by token."""
    seed: int = 0
    """Names the order of the rows."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each training process."""
    launcher: Literal["local", "torchrun", "ray"] = "local"
    """``local``: one process beside the server. ``torchrun``: ``processes`` of them on this machine. ``ray``: as many workers
    of a Ray job."""
    processes: int = Field(default=1, ge=1)
    """Training processes, each with a CUDA device of its own where there is CUDA; each takes its share of every batch."""
    sharding: Literal["none", "fsdp2"] = "none"
    """``none``: each process holds the whole model (data parallel). ``fsdp2``: weights, gradients and optimizer state are
    divided among them."""
    ray_address: str | None = None
    """``ray``: the address of the cluster's job server, such as ``http://head:8265``."""

    @model_validator(mode="after")
    def _options_are_read(self) -> Self:
        read = READ_BY.get(self.objective, OPTIONS)
        unread = sorted(name for name in OPTIONS - read if getattr(self, name) != _default(name))
        if unread:
            names = [name for name, options in READ_BY.items() if set(unread) <= options]
            remedy = f"objectives that do: {', '.join(names)}" if names else "no objective reads them all"
            raise ValueError(f"objective {self.objective!r} does not read {', '.join(unread)}; leave it out ({remedy})")
        return self

    @model_validator(mode="after")
    def _smoothing_is_read(self) -> Self:
        if self.measured_smoothing and "label_smoothing" not in READ_BY.get(self.objective, OPTIONS):
            raise ValueError(f"objective {self.objective!r} reads no label_smoothing: leave measured_smoothing out")
        return self

    @model_validator(mode="after")
    def _launcher_fits(self) -> Self:
        if self.launcher == "local" and self.processes > 1:
            raise ValueError('launcher "local" starts one process; for processes = n set launcher to "torchrun" or "ray"')
        if self.launcher == "local" and self.sharding != "none":
            raise ValueError(f'sharding = "{self.sharding}" divides a model among processes: take launcher "torchrun" or "ray"')
        if (self.launcher == "ray") != (self.ray_address is not None):
            raise ValueError('launcher "ray" and ray_address go together: set both or neither')
        return self

    @model_validator(mode="after")
    def _bounds_hold_together(self) -> Self:
        if 0 < self.max_length_ratio <= 1 or self.min_length_ratio == 1:
            raise ValueError("min_length_ratio must be below 1 and max_length_ratio above it: a round starts at 1")
        return self


def _default(name: str) -> Any:
    return TrainSection.model_fields[name].default
