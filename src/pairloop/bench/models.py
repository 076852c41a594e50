"""Random models of a shape on disk, so that every contestant reads the same weights by the same path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from pairloop.bench.cells import EOS_ID, Shape

EOS = "<eos>"
CONTEXT = 2_048


def write_model(folder: Path, shape: Shape, *, seed: int = 0) -> Path:
    """A Hugging Face model directory; one that is there already is left as it is. Its token i is the word "i"."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words = {EOS: EOS_ID} | {str(i): i for i in range(1, shape.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "pad_token": EOS}), encoding="utf-8")
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    torch.manual_seed(seed)
    config: Any = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def words(token_ids: tuple[int, ...]) -> str:
    """The text whose tokens these are."""
    return " ".join(str(token) for token in token_ids)
