"""TRL's DPOTrainer as a contestant: as installed, or with the settings that a search found to be its best."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairloop.bench.cells import TRAIN_CELLS, Pair, pairs
from pairloop.bench.models import words
from pairloop.bench.ours import on
from pairloop.bench.pacing import Pacer
from pairloop.policy.scoring import LoraSettings

Settings = Mapping[str, Any]

DEFAULT: Settings = {}
"""As installed: bfloat16, gradient checkpointing, and the reference's forward pass in every step."""
KNOWN_BEST: Settings = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
"""What the search found on CPUs: the quick benchmark takes it without a search."""
CHANGES: Mapping[str, Settings] = {
    "no checkpointing": {"gradient_checkpointing": False},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "float32": {"bf16": False},
    "bfloat16 weights": {"model_init_kwargs": {"dtype": "bfloat16"}},
    "hub kernels": {"model_init_kwargs": {"use_kernels": True}},
    "compiled": {"torch_compile": True},
}
"""What the search tries one after the other, each on top of those that paid. Padding-free is switched off in TRL 1.16."""
LORA_ONLY = frozenset({"bfloat16 weights"})
"""Full fine-tuning of bfloat16 weights loses small updates; pairloop keeps float32 weights there too."""
CUDA_ONLY = frozenset({"compiled"})
"""On CPUs each new batch shape is compiled again: a sixth of the speed in the first steps, and minutes of waiting."""


def train(spec: dict[str, Any], pacer: Pacer) -> None:
    """DPO on the cell's pairs, batch by batch in their order, with ``spec["settings"]`` over TRL's defaults."""
    import datasets  # type: ignore[import-untyped]
    import trl as peer
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback

    trl: Any = peer
    datasets.disable_progress_bars()
    cell, device = TRAIN_CELLS[spec["cell"]], on(spec, pacer)
    rows = [row(pair) for pair in pairs(cell, spec["pairs"])]
    tokenizer: Any = AutoTokenizer.from_pretrained(spec["model"])
    options: dict[str, Any] = {
        "output_dir": str(Path(spec["folder"]) / "trl"),
        "per_device_train_batch_size": cell.batch_size,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        # More than there will be turns: the pacer says when it is over.
        "num_train_epochs": 1_000,
        "use_cpu": device.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }

    class Timed(trl.DPOTrainer):  # type: ignore[misc]
        """Says what the reference's pass over the data cost, where the settings ask for one."""

        pass_s = 0.0

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            clock = time.process_time if device.type == "cpu" else time.perf_counter
            started_s = clock()
            scored = super()._precompute_ref_logps(*arguments)
            self.pass_s += clock() - started_s
            return scored

    class Turns(TrainerCallback):
        """Takes a step when the pacer says so."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            del args, state
            sides = [len(sample["prompt_ids"]) * 2 + len(sample["chosen_ids"]) + len(sample["rejected_ids"]) for sample in read]
            control.should_training_stop = not pacer.ready(
                pass_s_per_pair=trainer.pass_s / len(rows), tokens_per_pair=sum(sides) / len(rows)
            )
            return control

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            del args, state
            control.should_training_stop = not pacer.step(cell.batch_size)
            return control

    lora = LoraSettings()
    adapter = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any = Timed(
        model=spec["model"],
        args=trl.DPOConfig(**options | spec["settings"]),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter if spec["mode"] == "lora" else None,
        callbacks=[Turns()],
    )
    read = trainer.train_dataset
    trainer.train()


def row(pair: Pair) -> dict[str, str]:
    """The pair as text; TRL tokenizes it and ends the answers with EOS itself."""
    return {
        "prompt": words(pair.prompt),
        # A word ends where the next begins: the blank belongs to the answer.
        "chosen": " " + words(pair.chosen[:-1]),
        "rejected": " " + words(pair.rejected[:-1]),
    }
