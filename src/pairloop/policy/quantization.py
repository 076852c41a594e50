"""Bases kept in 4 bits (QLoRA, arXiv 2305.14314): transformers reads them through bitsandbytes, adapters stay plain PEFT."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from pairloop.errors import ModelError

Quantization = Literal["none", "nf4"]


def loading_options(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told beside the folder; ModelError where the machine cannot do it.

    NF4 with double quantization; what is computed with is ``dtype``.
    """
    if quantization == "none":
        return {}
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f'policy.quantization = "{quantization}" needs {" and ".join(missing)}: pip install "pairloop[quantized]"'
        )
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f'policy.quantization = "{quantization}" runs on CUDA and on the CPU, not on {device.type}')
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    settings = make(
        load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def settle(model: nn.Module) -> None:
    """Have the engine and the trainer compute with the same numbers.

    On CPUs with bfloat16 units bitsandbytes would, in passes without gradient, round the scales to bfloat16, in place.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def matrix_shape(layer: nn.Module) -> tuple[int, ...] | None:
    """The shape of a layer's matrix; of one in 4 bits, whose weight is a row of bytes, that of what it stands for."""
    sizes: Any = layer
    weight = getattr(layer, "weight", None)
    if weight is not None and hasattr(weight, "quant_state"):
        return sizes.out_features, sizes.in_features
    return None if weight is None else tuple(weight.shape)
