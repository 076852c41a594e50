"""Tiny random models for tests, in the plain Hugging Face layout; their weights are large enough to matter."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.utils import logging as transformers_logging

from pairloop.policy.scoring import LoraSettings, load_causal_lm
from pairloop.types import Version, VersionKind

EOS = "<eos>"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
FAMILIES = ("llama", "gpt2", "sliding", "bloom", "rwkv", "mamba")


def byte_tokenizer() -> Tokenizer:
    """Every byte one token, and EOS as token 0."""
    vocab = {EOS: 0} | {letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def letter_tokenizer() -> Tokenizer:
    """Eight tokens: EOS and the letters a to g."""
    tokenizer = Tokenizer(models.WordLevel({EOS: 0} | {letter: i + 1 for i, letter in enumerate("abcdefg")}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, template: str | None = TEMPLATE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": EOS} | ({"chat_template": template} if template is not None else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    family: str = "llama",
    seed: int = 0,
    gain: float = 12.0,
    context: int = 128,
    hidden: int = 16,
) -> Path:
    """A random two-layer model; ``gain`` scales its weights, so that its distribution is far from uniform."""
    tokenizer = tokenizer or byte_tokenizer()
    write_tokenizer(folder, tokenizer)
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    torch.manual_seed(seed)
    model = _model(family, int(tokenizer.get_vocab_size()), context, hidden)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith(("A_log", "time_decay")):
                parameter.mul_(gain if family != "mamba" else 2.0)
    model.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base_dir: Path, *, seed: int, rank: int = 4, alpha: int = 8) -> Path:
    """A LoRA adapter with random weights that change the base's distribution."""
    torch.manual_seed(seed)
    model: Any = load_causal_lm(base_dir, trainable=True, lora=LoraSettings(rank, alpha))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    # "auto" would look at the vocabulary of a base that stands in no hub.
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def version(number: int, kind: VersionKind, path: Path) -> Version:
    return Version("bot", number, kind, str(path), "0" * 64, number - 1, None, None, datetime(2026, 1, 1, tzinfo=UTC))


def _model(family: str, vocab: int, context: int, hidden: int) -> Any:
    common: dict[str, Any] = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": 2}
    common |= {"eos_token_id": 0, "pad_token_id": 0}
    heads: dict[str, Any] = {**common, "num_attention_heads": 2, "bos_token_id": 0}
    wide: dict[str, Any] = {**heads, "intermediate_size": 32, "max_position_embeddings": context}
    makers: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**wide, num_key_value_heads=2, tie_word_embeddings=True)),
        "sliding": lambda: MistralForCausalLM(MistralConfig(**wide, num_key_value_heads=1, sliding_window=4)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab, n_embd=hidden, n_layer=2, n_head=2, n_positions=context, bos_token_id=0, eos_token_id=0
            )
        ),
        "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=vocab, hidden_size=hidden, n_layer=2, n_head=2)),
        "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**common, context_length=context, rescale_every=0)),
        "mamba": lambda: MambaForCausalLM(MambaConfig(**common, state_size=4, time_step_rank=2)),
    }
    return makers[family]().eval()
