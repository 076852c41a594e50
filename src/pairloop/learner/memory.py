"""Memory of a pass: its token budget, which is halved once where memory runs out, and layers that are computed again."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from pairloop.errors import ConfigError
from pairloop.learner.batches import MicroBatch, is_packed, micro_batches
from pairloop.learner.data import TokenGroup
from pairloop.learner.supervise import is_out_of_memory
from pairloop.learner.workers import Workers

LOG = logging.getLogger(__name__)

Found = TypeVar("Found")


@dataclass(slots=True)
class TokenBudget:
    """How many tokens one forward pass reads at most (0: no bound); ``warning`` says that and why it was halved."""

    tokens: int = 0
    warning: str = ""
    may_halve: bool = True

    def run(
        self, model: nn.Module, groups: Sequence[TokenGroup], work: Callable[[list[MicroBatch]], Found], *, unbounded: int = 0
    ) -> Found:
        """``work`` on the groups' micro batches; where memory runs out, once, again from its beginning on half as many tokens.

        unbounded: the bound where the budget has none. Raises what ``work`` raises: out of memory too, where the budget was
        halved before, or the largest micro batch is one group, which nothing makes smaller.
        """
        packed = is_packed(model, groups)
        parts = micro_batches(groups, self.tokens or unbounded, packed=packed)
        largest = max(parts, key=lambda part: part.tokens, default=None)
        try:
            return work(parts)
        except (MemoryError, RuntimeError) as error:
            if not self.may_halve or self.warning or largest is None or len(largest.groups) == 1 or not is_out_of_memory(error):
                raise
            self._halve(largest.tokens, str(error) or type(error).__name__)
        # Only here, where the error is gone, are the tensors of its pass.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return work(micro_batches(groups, self.tokens, packed=packed))

    def resume(self, earlier: Mapping[str, Any]) -> None:
        """Go on with an earlier attempt's budget where that was halved, unless the configuration asks for less by now."""
        if earlier.get("warning"):
            self.tokens = min(self.tokens or earlier["tokens"], earlier["tokens"])
            self.warning = earlier["warning"]

    def agree(self, workers: Workers) -> None:
        """Take over what memory has left to other workers."""
        for earlier in workers.gather(asdict(self)):
            self.resume(earlier)

    def _halve(self, tokens: int, reason: str) -> None:
        self.tokens = tokens // 2
        self.warning = (
            f"the device ran out of memory in a pass over {tokens} tokens; from here on they are {self.tokens} at most, "
            f"as train.max_tokens_per_batch = {self.tokens} would have it ({reason[:200]})"
        )
        LOG.warning(self.warning)


def checkpoint_layers(model: nn.Module) -> None:
    """Keep the inputs of the model's layers only, and compute the rest of each again in the backward pass.

    ConfigError where the model has no such layers. transformers' own switch acts in training mode alone, which brings dropout
    back, and asks for a gradient down to the embeddings, which LoRA does without.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError("train.gradient_checkpointing: this model's layers cannot be computed again one by one; leave it out")
    for layer in layers:
        again: Any = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = again
