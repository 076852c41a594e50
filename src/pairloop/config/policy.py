"""Which model is served and trained, how its versions are made, and the engine that samples."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pairloop.config.section import Section, duration_s

_SERVER_URL = re.compile(r"https?://[^/?#@\s]+")


class PolicySection(Section):
    """Which model is served and trained, and how its versions are made."""

    name: str = Field(default="support-bot", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What clients send as `model`; a policy name is its lineage of versions."""
    model: str = "starter"
    """``starter`` (the embedded default), ``fake``, a Hugging Face model directory, or a hub id."""
    method: Literal["full", "lora"] = "lora"
    """All weights, or one LoRA adapter per version; fixed for the life of a policy."""
    lora_rank: int = Field(default=16, ge=1, le=512)
    """Rank of the adapter; fixed for the life of a policy."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapter: alpha over rank."""
    lora_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter, or ``all-linear``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers the engine and the trainer compute with; log-probs are float32 either way."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4`` keeps the base's matrices in 4 bits (QLoRA, by bitsandbytes) in engine and trainer; LoRA only, and fixed for the
    life of a policy."""
    device: str = "auto"
    """``auto`` takes CUDA where it is, else the CPU."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the engine."""
    max_batch: int = Field(default=64, ge=1)
    """Completions sampled together by one forward pass."""
    max_loaded: int = Field(default=4, ge=2)
    """Versions kept in memory; the base, champion and challenger are never evicted."""
    engine: Literal["local", "vllm"] = "local"
    """What samples: ``local``, this process; ``vllm``, the vLLM-compatible servers of ``engine_urls``, which hold the same base
    and take adapters (``method = "lora"``). Template, scoring and training stay here (docs/engines.md)."""
    engine_urls: tuple[str, ...] = ()
    """The servers, such as ``["http://gpu-1:8000", "http://gpu-2:8000"]``, without ``/v1``; on a private network only."""
    engine_model: str | None = None
    """The base model's name on the servers, where they list more than one."""
    engine_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key."""
    engine_artifacts: str | None = None
    """The artifacts folder as the servers see it; by default under the path that it has here."""
    engine_timeout: str = "120s"
    """How long a server may be silent in the middle of a request."""
    engine_poll: str = "2s"
    """How often each server is asked whether it is well and has its adapters."""
    engine_wait: str = "5m"
    """How long to wait at start for a first server that is ready."""

    @model_validator(mode="after")
    def _quantized_bases_take_adapters(self) -> Self:
        if self.quantization != "none" and self.method == "full":
            raise ValueError(f'quantization = "{self.quantization}" keeps the base as it is: set method to "lora"')
        return self

    @field_validator("engine_timeout", "engine_poll", "engine_wait")
    @classmethod
    def _durations(cls, value: str) -> str:
        duration_s(value)
        return value

    @field_validator("engine_urls")
    @classmethod
    def _roots_of_servers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not _SERVER_URL.fullmatch(url):
                raise ValueError(f"{url!r} is not the root of a server; write for example http://gpu-1:8000, without a path")
        if len(set(value)) < len(value):
            raise ValueError("a server is named twice")
        return value

    @model_validator(mode="after")
    def _engine_is_whole(self) -> Self:
        if self.engine == "local":
            set_keys = sorted(
                key for key in self.model_fields_set if key.startswith("engine_") and getattr(self, key) != _default(key)
            )
            if set_keys:
                raise ValueError(f'{", ".join(set_keys)}: are for engine = "vllm", and engine is "local"')
            return self
        if not self.engine_urls:
            raise ValueError('engine = "vllm" needs engine_urls, the servers that sample')
        if self.method == "full":
            raise ValueError(
                'policy.method = "full" makes versions of all weights, and engine = "vllm" takes adapters only: set method to '
                '"lora", or engine to "local"'
            )
        if self.model == "fake":
            raise ValueError('model = "fake" has no weights that a server could hold: set engine to "local"')
        return self


def _default(key: str) -> Any:
    return PolicySection.model_fields[key].default
