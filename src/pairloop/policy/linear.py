"""Linear layers on the CPU through oneDNN with its own layout of the weights, for models that only answer.

PyTorch hands float32 products to MKL, whose kernels for few rows are slow, and on AMD use half of the vector unit; bfloat16
ones go to oneDNN, which lays the weights out anew in every call. Laid out once, products of 2 to 64 rows take half of the time.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MIN_WEIGHTS = 2**15
"""Smaller matrices stay as they are: the call would cost more than it saves."""
ROWS = 16
"""Rows for which the layout is chosen; others are multiplied by it too."""


def lay_out(model: nn.Module) -> None:
    """Lay the model's larger linear layers out for good: it answers as before, and can be neither trained nor saved any more.

    Does nothing where there is no oneDNN. The weights are replaced, so they are not there twice; but for those that another
    module reads too (a head that is tied to the embedding).
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in _candidates(model):
        packed = _answer_from_packed(module)
        if id(module.weight) not in tied:
            module.weight = nn.Parameter(packed, requires_grad=False)


@contextmanager
def laid_out(model: nn.Module) -> Iterator[None]:
    """While open the model answers by a copy of its weights, laid out as in `lay_out`; they must not change meanwhile."""
    modules = _candidates(model)
    try:
        for module in modules:
            _answer_from_packed(module)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _candidates(model: nn.Module) -> list[nn.Linear]:
    mkldnn: Any = torch.backends.mkldnn
    # The operators are those that torch.compile uses: no public interface, and a build without oneDNN lacks them.
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    if platform.machine() not in ("x86_64", "AMD64") or not mkldnn.is_available() or not known:
        return []
    dtypes = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.numel() >= MIN_WEIGHTS
        and module.weight.device.type == "cpu"
        and module.weight.layout is torch.strided
        and module.weight.dtype in dtypes
    ]


def _answer_from_packed(module: nn.Linear) -> Tensor:
    """Have the module multiply by a laid-out copy of its weight; the copy."""
    operators: Any = torch.ops.mkldnn
    multiply = operators._linear_pointwise
    packed: Tensor = operators._reorder_linear_weight(module.weight.detach(), ROWS)
    bias = None if module.bias is None else module.bias.detach()

    def forward(input: Tensor) -> Tensor:
        answer: Tensor = multiply(input, packed, bias, "none", [], "")
        return answer

    module.forward = forward  # type: ignore[method-assign]
    return packed
