"""The loaded versions of one policy: the base once, LoRA adapters on it, full versions beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pairloop.config import PolicySection
from pairloop.errors import EngineError
from pairloop.policy.linear import lay_out
from pairloop.policy.mixed import Adapters
from pairloop.policy.scoring import LoraSettings, check_adapter, load_adapter, load_full, lora_layers
from pairloop.types import BASE_VERSION, Version


class Shelf:
    """Versions by number. Only the engine's thread may call `activate`, `put_adapter` and `drop`."""

    def __init__(self, base_dir: Path, section: PolicySection, device: torch.device) -> None:
        self._section = section
        self._device = device
        base = load_full(base_dir, dtype=section.dtype, device=device, quantization=section.quantization)
        self._base = base.requires_grad_(False)
        lay_out(self._base)
        self._peft: nn.Module = self._base
        """The base, or PEFT's wrapper around it once there was an adapter, whose layers PEFT put into the base itself."""
        self._adapters: set[int] = set()
        self.mixed = Adapters(self._base, _name)
        self._full: dict[int, nn.Module] = {}
        self._active: int | None = None

    @property
    def base(self) -> nn.Module:
        return self._base

    def __contains__(self, number: object) -> bool:
        return number == BASE_VERSION or number in self._adapters or number in self._full

    def numbers(self) -> frozenset[int]:
        return frozenset({BASE_VERSION, *self._adapters, *self._full})

    def read_full(self, version: Version) -> nn.Module:
        """The module of a full version, not yet on the shelf: the slow part of loading, for any thread."""
        module = load_full(Path(version.path), dtype=self._section.dtype, device=self._device).requires_grad_(False)
        lay_out(module)
        return module

    def put_full(self, number: int, module: nn.Module) -> None:
        self._full[number] = module

    def put_adapter(self, version: Version) -> bool:
        """Read an adapter onto the base; True where its rows may be mixed with those of the base and of others like it.

        ModelError where it does not fit, and then nothing has changed.
        """
        section, path = self._section, Path(version.path)
        check_adapter(path, LoraSettings(section.lora_rank, section.lora_alpha, section.lora_targets))
        self._peft = load_adapter(self._peft, path, _name(version.number), device=self._device)
        self._peft.requires_grad_(False).eval()
        self._adapters.add(version.number)
        self._active = None
        return self.mixed.add(version.number)

    def drop(self, number: int) -> None:
        self._full.pop(number, None)
        if number in self._adapters:
            self._adapters.discard(number)
            self.mixed.forget(number)
            self._active = None
            wrapper: Any = self._peft
            # PEFT warns when it has to choose the next active adapter itself.
            wrapper.base_model.set_adapter([_name(other) for other in sorted(self._adapters)[:1]], inference_mode=True)
            wrapper.delete_adapter(_name(number))

    def activate(self, number: int) -> nn.Module:
        """The module that answers as version ``number``; EngineError where it is not loaded."""
        if number in self._full:
            return self._full[number]
        if number not in self:
            raise EngineError(f"version {number} is not loaded")
        if self._active != number:
            for layer in lora_layers(self._base) if self._adapters else ():
                if number == BASE_VERSION:
                    layer.enable_adapters(False)
                else:
                    layer.enable_adapters(True)
                    layer.set_adapter(_name(number), inference_mode=True)
            self._active = number
        return self._base


def _name(number: int) -> str:
    return f"v{number}"
