"""The loop as a team writes it today: transformers' `generate`, a crowd that picks, TRL's DPOTrainer, round after round.

``python -m pairloop.bench.diy JOB.json``. The same base, customers, pairs per round, passes and learning rate as the demo, and
the same held-out prompts. No server, no store, no duel, no gate: each round's model replaces the last.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pairloop.demo import measure as ruler
from pairloop.starter import MODEL_DIR, corpus, customers

PAIRS = 512
PROMPTS_TOGETHER = 32
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "trl_default": {},
    "trl_tuned": {
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 1.0],
        "bf16": False,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
    },
}
"""TRL's own defaults, and what someone who knows it sets; batch size, passes and learning rate are the starter's in both."""


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """All rounds; win rate against the base, utility and CPU seconds by phase after each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    rng = random.Random(f"diy:{job['seed']}")
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    cpu_s: dict[str, float] = {}
    cases = ruler.held_out_cases()
    with _timed(cpu_s, "evaluation"):
        base = _measured(model, tokenizer, cases)
    rounds = []
    for number in range(1, job["rounds"] + 1):
        with _timed(cpu_s, "sampling"):
            drawn = [corpus.draw_training_case(rng) for _ in range(PAIRS)]
            answers = _answers(model, tokenizer, drawn, copies=2)
        rows = _picked(drawn, answers, rng)
        with _timed(cpu_s, "training"):
            model = _trained(model, tokenizer, rows, job, Path(job["folder"]) / f"round-{number}")
        with _timed(cpu_s, "evaluation"):
            now = _measured(model, tokenizer, cases)
        rate = ruler.win_rate(now, base)
        rounds.append({"pairs": len(rows), "win_rate": rate.mean, "ci95": [rate.lo, rate.hi], "utility": now.utility})
    return {"rounds": rounds, "cpu_s": cpu_s, "base_utility": base.utility}


def _picked(cases: Sequence[corpus.Case], answers: Sequence[Sequence[str]], rng: random.Random) -> list[dict[str, Any]]:
    """TRL's rows of the picks; two answers that are the same are no pair."""
    rows = []
    for index, (case, (left, right)) in enumerate(zip(cases, answers, strict=True)):
        pick = customers.customer(index).pick(case, left, right, rng)
        if pick.outcome in ("left", "right"):
            chosen, rejected = (left, right) if pick.outcome == "left" else (right, left)
            row = {"prompt": case.messages(), "chosen": _said(chosen), "rejected": _said(rejected)}
            rows.append(row)
    return rows


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _trained(model: Any, tokenizer: Any, rows: list[dict[str, Any]], job: Mapping[str, Any], folder: Path) -> Any:
    """The model after the starter's two passes, through a folder, as TRL reads its reference from one."""
    import datasets  # type: ignore[import-untyped]
    import trl as peer

    trl: Any = peer
    datasets.disable_progress_bars()
    model.save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    options: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "seed": job["seed"],
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer: Any = trl.DPOTrainer(
        model=str(folder / "parent"),
        args=trl.DPOConfig(**options, **SETTINGS[job["settings"]]),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.model.eval()


def _answers(model: Any, tokenizer: Any, cases: Sequence[corpus.Case], *, copies: int) -> list[list[str]]:
    """``copies`` answers to each case at temperature 1."""
    import torch

    found: list[list[str]] = []
    for start in range(0, len(cases), PROMPTS_TOGETHER):
        part = [case.messages() for case in cases[start : start + PROMPTS_TOGETHER]]
        inputs = tokenizer.apply_chat_template(
            part, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=copies,
                max_new_tokens=ruler.MAX_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [texts[i : i + copies] for i in range(0, len(texts), copies)]
    return found


def _measured(model: Any, tokenizer: Any, cases: Sequence[corpus.Case]) -> ruler.Measured:
    """One answer to each held-out prompt, and what they are worth."""
    answers = tuple(answer for (answer,) in _answers(model, tokenizer, cases, copies=1))
    utilities = tuple(customers.utility(case, answer) for case, answer in zip(cases, answers, strict=True))
    right = [customers.numbers_right(case, answer) for case, answer in zip(cases, answers, strict=True)]
    return ruler.Measured(answers, utilities, ruler.mean_interval([float(found) for found in right if found is not None]))


@contextmanager
def _timed(cpu_s: dict[str, float], phase: str) -> Iterator[None]:
    started_s = time.process_time()
    yield
    cpu_s[phase] = cpu_s.get(phase, 0.0) + time.process_time() - started_s


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    result = run(job)
    Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
