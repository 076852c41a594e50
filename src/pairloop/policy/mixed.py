"""Several LoRA adapters in one forward pass: the base's products once for all rows, and each row under its own adapter.

The adapters' matrices stand stacked. One product gives every row's coordinates under all of them, those under other adapters
than its own are set to 0, and one more adds the rest to what the base says. Adapters are therefore looked at beforehand: none
may hold a number that is not finite, as 0 times it would reach the others' rows.

Axis letters: N rows, R coordinates of all adapters in the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pairloop.policy.scoring import lora_layers
from pairloop.types import BASE_VERSION

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

Stack = dict[nn.Module, tuple[Tensor, Tensor]]
"""Of each layer that has adapters: what leads down, [in, R], and what leads up, [R, out], with the scale in it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The adapter of each row: for all that whose coordinates are ``part``, or ``closed_NR`` is True at those of others."""

    stack: Stack
    part: slice | None = None
    closed_NR: Tensor | None = None

    def add(self, layer: nn.Module, base: Tensor, inputs: Tensor) -> Tensor:
        """What the layer's base says, [..., out], and what the rows' adapters add to it."""
        if layer not in self.stack:
            return base
        down, up = self.stack[layer]
        if self.part is not None:
            down, up = down[:, self.part], up[self.part]
        low_NR = inputs.flatten(0, -2).to(down.dtype) @ down
        if self.closed_NR is not None:
            low_NR.masked_fill_(self.closed_NR, 0)
        flat = base.flatten(0, -2)
        if flat.dtype is up.dtype:
            return flat.addmm_(low_NR, up).view_as(base)
        return (flat + low_NR @ up).to(base.dtype).view_as(base)


class Adapters:
    """The adapters on one base whose rows may share a forward pass, by version. Used by the engine's thread only."""

    def __init__(self, base: nn.Module, name: Callable[[int], str]) -> None:
        self._base = base
        self._name = name
        self._ranks: dict[int, int] = {}
        self._choice: Choice | None = None
        """That of the forward pass in progress; None where PEFT decides."""
        self._stacked: frozenset[int] = frozenset()
        self._stack: Stack = {}

    def add(self, number: int) -> bool:
        """Take in an adapter that PEFT has put on the base; False, and nothing done, where it cannot be mixed."""
        rank = self._mixable_rank(self._name(number))
        if rank is None or set(self._ranks.values()) - {rank}:
            return False
        self.forget(number)
        self._ranks[number] = rank
        for layer in lora_layers(self._base):
            if "forward" not in layer.__dict__:
                self._answer_by_choice(layer)
        return True

    def forget(self, number: int) -> None:
        self._ranks.pop(number, None)
        self._stacked, self._stack = frozenset(), {}

    def choose(self, version_N: Sequence[int], among: Sequence[int]) -> Choice:
        """The adapters of rows of these versions, or of all rows where there is one; stacked for all versions of ``among``."""
        present, asked = frozenset(among) - {BASE_VERSION}, set(version_N)
        if asked == {BASE_VERSION}:
            return Choice({})
        # A stack is kept while it holds too much, as versions come back; but not much too much.
        if not present <= self._stacked or len(self._stacked) > 2 * len(present):
            self._stacked, self._stack = present, self._stack_of(sorted(present))
        owners = [number for number in sorted(self._stacked) for _ in range(self._ranks[number])]
        if len(asked) == 1:
            start = owners.index(version_N[0])
            return Choice(self._stack, part=slice(start, start + self._ranks[version_N[0]]))
        device = next(iter(self._stack.values()))[0].device
        closed_NR = torch.tensor(version_N, device=device)[:, None] != torch.tensor(owners, device=device)
        return Choice(self._stack, closed_NR=closed_NR)

    @contextmanager
    def under(self, choice: Choice) -> Iterator[None]:
        """While open, the base's forward passes are those of the rows' own adapters."""
        self._choice = choice
        try:
            yield
        finally:
            self._choice = None

    def _mixable_rank(self, name: str) -> int | None:
        """The adapter's rank where it is plain LoRA of one rank on linear layers that see every row, with finite weights."""
        from peft.tuners.lora import Linear, LoraLayer

        ranks = set()
        for path, layer in self._base.named_modules():
            if not isinstance(layer, LoraLayer) or name not in layer.scaling:
                continue
            if type(layer) is not Linear or name in layer.lora_variant or ".experts." in path:
                return None
            down, up = _matrices(layer, name)
            if getattr(layer.lora_B[name], "bias", None) is not None or not (down.isfinite().all() and up.isfinite().all()):
                return None
            ranks.add(len(down))
        return ranks.pop() if len(ranks) == 1 else None

    def _answer_by_choice(self, layer: LoraLayer) -> None:
        module: Any = layer
        plain = module.forward

        def forward(inputs: Tensor, *args: Any, **options: Any) -> Tensor:
            if self._choice is None:
                by_peft: Tensor = plain(inputs, *args, **options)
                return by_peft
            return self._choice.add(module, module.base_layer(inputs), inputs)

        module.forward = forward

    def _stack_of(self, numbers: Sequence[int]) -> Stack:
        stack: Stack = {}
        names = [self._name(number) for number in numbers]
        for layer in lora_layers(self._base):
            has = [_matrices(layer, name) if name in layer.scaling else None for name in names]
            one = next((pair for pair in has if pair is not None), None)
            if one is not None:
                module: Any = layer
                # An adapter that leaves the layer alone adds nothing there.
                downs, ups = zip(*(pair or tuple(torch.zeros_like(half) for half in one) for pair in has), strict=True)
                stack[module] = (torch.cat(downs).t().contiguous(), torch.cat(ups, dim=1).t().contiguous())
        return stack


def _matrices(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """A, [rank, in], and B times the scale, [out, rank]."""
    down: Any = layer.lora_A[name]
    up: Any = layer.lora_B[name]
    return down.weight.detach(), up.weight.detach() * layer.scaling[name]
