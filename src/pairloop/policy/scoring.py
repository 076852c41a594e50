"""Causal language models: loading base, full and LoRA versions, and the log-probs of given completions.

Shared by the engine's `logps` and by the learner, so that both read a version in the same way. All models stay in
evaluation mode, also where they are trained: dropout off, as the recorded log-probs are those of the model without it.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pairloop.errors import ModelError
from pairloop.policy.engine import check_weights
from pairloop.policy.head import exact_logps, target_logps
from pairloop.policy.packed import hidden_states, takes_packed
from pairloop.policy.packing import pack
from pairloop.policy.quantization import Quantization, loading_options, matrix_shape, settle
from pairloop.types import VersionKind

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""How models call what they carry from token to token."""

_LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Rank, scale and targets of the adapters: fixed for a policy's whole chain."""

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


@dataclass(frozen=True, slots=True)
class Traits:
    """What a model's forward pass takes: an attention mask that it obeys, position ids, which cache, a shortened head."""

    masked: bool
    positions: bool
    cache: str | None
    logits_to_keep: bool

    @classmethod
    def of(cls, model: nn.Module) -> Traits:
        inner = bare(model)
        names = inspect.signature(inner.forward).parameters
        # Recurrent models take a mask for the signature's sake; what they have read cannot be masked.
        masked = "attention_mask" in names and not getattr(inner, "_is_stateful", False)
        cache = next((name for name in CACHE_NAMES if name in names), None)
        return cls(masked, "position_ids" in names, cache, "logits_to_keep" in names)


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first CUDA device where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def load_causal_lm(
    base_dir: Path,
    version_path: Path | None = None,
    kind: VersionKind = VersionKind.BASE,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trainable: bool = False,
    lora: LoraSettings | None = None,
    quantization: Quantization = "none",
) -> nn.Module:
    """One version as a module, in evaluation mode: the base, full weights, or the base under one adapter.

    With ``trainable`` and ``lora`` an adapter version goes on from its own weights, and any other version gets a fresh
    adapter (its output is unchanged until the first step); with ``trainable`` alone all weights are trained. ModelError
    names the folder and the reason; so it does where an adapter's rank, alpha or targets are not those of ``lora``.
    """
    target = resolve_device(device) if isinstance(device, str) else device
    if kind is not VersionKind.BASE and version_path is None:
        raise ModelError(f"a version of kind {kind.value} needs its folder")
    if kind is not VersionKind.ADAPTER:
        folder = version_path if kind is VersionKind.FULL and version_path is not None else base_dir
        model = load_full(folder, dtype=dtype, device=target, quantization=quantization)
        if trainable and lora is not None:
            model = _fresh_adapter(model, lora)
    else:
        assert version_path is not None
        if lora is not None:
            check_adapter(version_path, lora)
        base = load_full(base_dir, dtype=dtype, device=target, quantization=quantization)
        model = load_adapter(base, version_path, "default", device=target, trainable=trainable)
    if not trainable:
        model.requires_grad_(False)
    return model.eval()


def load_full(
    folder: Path, *, dtype: str | torch.dtype, device: torch.device, quantization: Quantization = "none"
) -> nn.Module:
    """The module with all its weights from ``folder``; ModelError where any is missing, misshapen or unreadable."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: config.json is missing; this is not a Hugging Face model directory")
    check_weights(folder)
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    options = {"dtype": wanted, "local_files_only": True, **loading_options(quantization, wanted, device)}
    loader: Any = AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(folder, output_loading_info=True, **options)
    except _LOADING_ERRORS as error:
        raise ModelError(f"{folder}: cannot be loaded as a causal language model: {error}") from error
    for fault in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report.get(fault):
            names = ", ".join(str(name) for name in sorted(report[fault], key=str)[:5])
            raise ModelError(f"{folder}: the weights do not fit config.json ({fault.replace('_', ' ')}: {names})")
    settle(model)
    # One in 4 bits is there already, and must not be moved.
    module: nn.Module = (model if quantization != "none" else model.to(device)).eval()
    return module


def load_adapter(model: nn.Module, folder: Path, name: str, *, device: torch.device, trainable: bool = False) -> PeftModel:
    """Put the adapter in ``folder`` on a base module (or beside the adapters already on it) under ``name``.

    ModelError where it cannot be read or does not fit; a broken folder leaves the adapters that are on the base as they were.
    """
    from peft import PeftModel  # seconds of imports that full fine-tuning never needs

    read_adapter_config(folder)
    check_adapter_weights(folder, bare(model))
    options: dict[str, Any] = {"adapter_name": name, "is_trainable": trainable, "torch_device": str(device)}
    wrapped: Any = PeftModel
    try:
        with _peft_quiet():
            if not isinstance(model, PeftModel):
                fresh: PeftModel = wrapped.from_pretrained(model, str(folder), **options)
                return fresh
            model.load_adapter(str(folder), **options)
            return model
    except _LOADING_ERRORS as error:
        if isinstance(model, PeftModel) and name in model.peft_config:
            model.delete_adapter(name)
        raise ModelError(f"{folder}: the adapter does not fit the base model: {error}") from error


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it stands; ModelError where it is missing or is not one of a LoRA adapter."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: adapter_config.json is missing; this is not a PEFT adapter") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: is not the configuration of a LoRA adapter")
    return config


def check_adapter_weights(folder: Path, base: nn.Module) -> None:
    """ModelError unless adapter_model.safetensors is whole and its matrices fit ``base``.

    Looked at beforehand, as PEFT puts its layers into the base before it finds that the weights do not fit them.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(f"{folder}: adapter_model.safetensors is missing")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not shapes:
        raise ModelError(f"{path}: holds no weights")
    modules = dict(base.named_modules())
    for key, shape in shapes.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            continue
        module: Any = modules.get(match["module"])
        found_shape = matrix_shape(getattr(module, "base_layer", module)) if module is not None else None
        size = shape[1] if match["side"] == "A" else shape[0]
        # Linear keeps [out, in] and Conv1D [in, out]; PEFT knows which, here it is enough that the size occurs.
        if found_shape is None or size not in found_shape:
            found = "no such layer" if found_shape is None else f"a layer of shape {found_shape}"
            raise ModelError(f"{path}: the adapter does not fit the base model: {key} {shape} meets {found}")


def check_adapter(folder: Path, lora: LoraSettings) -> None:
    """ModelError where the adapter's rank, alpha or targets are not the policy's: they are fixed for the whole chain."""
    config = read_adapter_config(folder)
    wanted: dict[str, object] = {"r": lora.rank, "lora_alpha": lora.alpha}
    for key, value in wanted.items():
        if config.get(key) != value:
            raise ModelError(
                f"{folder}: the adapter has {key} = {config.get(key)}, the policy's configuration says {value}; both are fixed "
                "for a policy's chain: set the old value, or start a new chain from the merged champion"
            )
    # PEFT writes what "all-linear" stood for, so only named targets can be compared; one that the base lacks fails on loading.
    found = config.get("target_modules")
    if isinstance(found, list) and lora.targets != "all-linear":
        names = {str(target).rsplit(".", 1)[-1] for target in found}
        if names != set(lora.targets):
            raise ModelError(
                f"{folder}: the adapter is on {sorted(names)}, the policy's configuration says {sorted(lora.targets)}; "
                "targets are fixed for a policy's chain"
            )


def bare(model: nn.Module) -> nn.Module:
    """The transformers module inside a PEFT wrapper (its adapters stay in it)."""
    # PEFT writes its configuration onto the transformers module too, so the attribute alone does not tell the wrapper.
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        # Not get_base_model(): after the last adapter was taken off, PEFT looks for its configuration and fails.
        tuner: Any = model.base_model
        inner: nn.Module = tuner.model
        return inner
    return model


def max_context(model: nn.Module) -> int:
    """The longest prompt plus completion that the model was made for, in tokens; 0 where its configuration does not say."""
    config: Any = bare(model).config
    for name in ("max_position_embeddings", "n_positions", "context_length", "max_sequence_length", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def vocab_size(model: nn.Module) -> int:
    """Rows of the input embedding: token ids stay below it."""
    inner: Any = bare(model)
    return int(inner.get_input_embeddings().weight.shape[0])


def completion_logps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Log-probs of completion tokens, differentiable: (``logp_NT`` float32, 0 where masked; ``mask_NT`` bool).

    N sequences, T tokens of the longest completion. Raw: temperature 1, whole vocabulary, softmax in float32; all of it in
    float64 where the model is (the lab checks gradients to machine precision). Where the model can take it the sequences are
    packed, each distinct prompt read once (see `packing`), and padded otherwise; the head runs on the positions that predict
    completion tokens only.
    """
    if not prompts or not all(prompts):
        raise ValueError("every sequence needs a prompt of at least one token: the first completion token is predicted from it")
    inner, device = bare(model), next(model.parameters()).device
    lengths = torch.tensor([len(completion) for completion in completions])
    mask_NT = torch.arange(int(lengths.max())) < lengths[:, None]
    longest = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    if takes_packed(inner, longest):
        packing = pack([tuple(prompt) for prompt in prompts], [tuple(completion) for completion in completions], device)
        targets = torch.tensor([token for completion in completions for token in completion], dtype=torch.int64, device=device)
        logp_M = target_logps(inner, hidden_states(inner, packing), targets)
    else:
        logp_M = _padded_logps(model, prompts, completions, mask_NT)
    mask_NT = mask_NT.to(device)
    logp_NT = torch.zeros(mask_NT.shape, dtype=logp_M.dtype, device=device)
    return logp_NT.masked_scatter(mask_NT, logp_M), mask_NT


def _padded_logps(
    model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], mask_NT: Tensor
) -> Tensor:
    """Log-probs of the completions' tokens, one sequence after the other, [M], from a batch that is padded on the right.

    That is exact for every causal model, recurrent ones included.
    """
    device = next(model.parameters()).device
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    row, t = mask_NT.nonzero(as_tuple=True)
    column = starts[row] + t
    targets = ids[row, column].to(device)
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
    if Traits.of(model).masked:
        inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long().to(device)
    # The token in a column is predicted one column earlier.
    with _head_on(model, row.to(device), (column - 1).to(device)) as packed:
        logits = model(**inputs).logits
    return exact_logps(logits[0] if packed else logits[row.to(device), (column - 1).to(device)], targets)


@contextmanager
def _head_on(model: nn.Module, row: Tensor, column: Tensor) -> Iterator[bool]:
    """While open, the output head sees only the hidden states at (row, column), as one batch row; False without a head.

    Logits of the other positions are most of the memory of a scoring pass. What a model does to logits behind its head
    (scaling, soft caps) is elementwise and works on the packed ones.
    """
    head = getattr(bare(model), "get_output_embeddings", lambda: None)()
    if head is None:
        yield False
        return

    def pack(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][row, column][None], *args[1:])

    hook = head.register_forward_pre_hook(pack)
    try:
        yield True
    finally:
        hook.remove()


def _fresh_adapter(model: nn.Module, lora: LoraSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrap: Any = get_peft_model
    try:
        with _peft_quiet():
            wrapped: nn.Module = wrap(model, config)
    except ValueError as error:
        raise ModelError(f"no adapter can be put on the model: {error}") from error
    return wrapped


@contextmanager
def _peft_quiet() -> Iterator[None]:
    """PEFT 0.21 reads an attribute that transformers 5.23 deprecated; nothing we or a user could change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The layers of ``model`` that carry adapters."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]
