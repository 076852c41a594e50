"""The model card of an exported version: README.md with the Hugging Face front matter. Figures only, never a message's text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairloop.loop.export.facts import Facts
from pairloop.statistics import share
from pairloop.types import Interval, Verdict

CARD_FILE = "README.md"
_LICENSE = re.compile(r"^license:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_COUNTED = ("pairs", "steps", "steps_planned", "weights_step", "trained_tokens", "step")
_PASSED = {True: "pass", False: "fail", None: "open"}


def card(facts: Facts, form: str, base_dir: Path) -> str:
    """The whole card. ``form``: ``adapter`` or ``model``; ``base_dir``: where the base's own card may state its licence."""
    sections = [_head(facts, form), _use(facts, form), _data(facts), _training(facts), _evaluation(facts), _gate(facts)]
    return "\n".join([_front_matter(facts, form, license_of(base_dir)), *(part for part in sections if part)])


def license_of(base_dir: Path) -> str | None:
    """What the front matter of the base's own card says; None where it has none, and the user has to say."""
    path = base_dir / CARD_FILE
    if not path.is_file():
        return None
    _, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("---\n")
    front, closed, _ = rest.partition("\n---")
    found = _LICENSE.search(front) if closed else None
    return found[1].strip("\"'") if found else None


def _front_matter(facts: Facts, form: str, license_name: str | None) -> str:
    from huggingface_hub import ModelCardData

    tags = ["pairloop", objective_of(facts)]
    data = ModelCardData(
        base_model=facts.base,
        base_model_relation="adapter" if form == "adapter" else "finetune",
        library_name="peft" if form == "adapter" else "transformers",
        license=license_name,
        pipeline_tag="text-generation",
        tags=[*tags, "lora"] if form == "adapter" else tags,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def objective_of(facts: Facts) -> str:
    """What it was trained with, such as ``dpo``."""
    return str(facts.recipe.get("train", {}).get("objective", "unknown"))


def _head(facts: Facts, form: str) -> str:
    version = facts.version
    what = "A LoRA adapter of" if form == "adapter" else "A model fine-tuned from"
    moves = [f"{move.action} {move.created_at:%Y-%m-%d}" for move in facts.history]
    rows: dict[str, Any] = {
        "parent": "–" if version.parent is None else f"{version.policy}@{version.parent}",
        "made (UTC)": f"{version.created_at:%Y-%m-%d %H:%M:%S}",
        "artifact hash": f"`{version.artifact_hash}`",
        "cycle": None if facts.cycle is None else facts.cycle.number,
        "run": version.run_id,
        "history": ", ".join(moves) or None,
    }
    text = f"{what} `{facts.base}`, trained by pairloop with the objective `{objective_of(facts)}`."
    return f"# {version.name}\n\n{text}\n\n{_table(('', ''), rows)}"


def _use(facts: Facts, form: str) -> str:
    if form == "model":
        return '## Use\n\n    AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n    vllm serve THIS_FOLDER\n'
    name, rank = facts.version.name.replace("@", "--v"), facts.recipe.get("lora_rank", 16)
    lines = (
        f'base = AutoModelForCausalLM.from_pretrained("{facts.base}")',
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        f"vllm serve {facts.base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=THIS_FOLDER",
    )
    return "## Use\n\n" + "".join(f"    {line}\n" for line in lines)


def _data(facts: Facts) -> str:
    dataset = facts.dataset
    if dataset is None:
        return ""
    rows: dict[str, Any] = {
        "dataset": f"`{dataset.dataset_id}`",
        "hash": None if facts.data_hash is None else f"`{facts.data_hash}`",
        "rows to train on": dataset.n_train,
        "rows held out": dataset.n_heldout,
        **{f"count: {name}": value for name, value in dataset.counts.items()},
        **{f"set aside: {reason}": value for reason, value in dataset.dropped.items()},
    }
    return f"## Data\n\n{_table(('', ''), rows)}"


def _training(facts: Facts) -> str:
    result = facts.result
    if not result:
        return ""
    rows: dict[str, Any] = {
        name.replace("_", " "): value for name, value in result.items() if name in _COUNTED or _is_loss(name)
    }
    rows["stopped because"] = result.get("stop_message") or result.get("stopped_because")
    rows |= {f"not used: {reason}": value for reason, value in (result.get("dropped") or {}).items()}
    before, after = result.get("heldout_before") or {}, result.get("heldout_after") or {}
    rows |= {f"held out: {name}": f"{before[name]:.4g} → {value:.4g}" for name, value in after.items() if name in before}
    libraries = ", ".join(f"{name} {version}" for name, version in (result.get("libraries") or {}).items())
    recipe = json.dumps(facts.recipe, indent=2, sort_keys=True)
    used = f"\nLibraries: {libraries}\n" if libraries else ""
    return f"## Training\n\n{_table(('', ''), rows)}{used}\n```json\n{recipe}\n```\n"


def _is_loss(name: str) -> bool:
    """What a checkpoint in the middle of a training has, such as ``valid_loss``."""
    return name.startswith(("train_", "valid_"))


def _evaluation(facts: Facts) -> str:
    if not facts.report:
        return (
            "## Evaluation\n\nNo offline report: this version was not made by a cycle, or its cycle has not evaluated it yet.\n"
        )
    rows = {name: f"{_interval(value)} | {value.n}" for name, value in facts.report.items()}
    return f"## Evaluation\n\nAgainst the champion of then, 95 % intervals.\n\n{_table(('metric', 'value', 'n'), rows)}"


def _gate(facts: Facts) -> str:
    verdict = facts.verdict
    if verdict is None:
        return ""
    # Numbers without the reasons' words: those may quote a labeller's error, and that a message.
    reasons = {
        reason.rule: f"{_PASSED[reason.passed]} | {_number(reason.observed)} | {_number(reason.threshold)}"
        for reason in verdict.reasons
    }
    table = _table(("rule", "", "figure", "limit"), reasons)
    note = "Where a rule compares one end of an interval with its limit, the figure is that end."
    return f"## Gate: {verdict.kind}\n\n{_duel(verdict)}\n\n{note}\n\n{table}"


def _duel(verdict: Verdict) -> str:
    decisive = verdict.wins + verdict.losses
    rate = share(verdict.wins / decisive if decisive else 0.5, decisive)
    return (
        f"{verdict.wins} picks won, {verdict.losses} lost, {verdict.ties} ties, {verdict.raters} raters; "
        f"win rate {_interval(rate)} (95 %); e-value {verdict.e_value:.3g}."
    )


def _interval(value: Interval) -> str:
    return f"{value.mean:.4g} [{value.lo:.4g}, {value.hi:.4g}]"


def _table(headers: tuple[str, ...], rows: Mapping[str, Any]) -> str:
    """Rows without a value are left out; a value may hold further cells."""
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
