"""Sampling beside transformers: tokens per second, two completions of every prompt, cell by cell."""

from __future__ import annotations

from typing import Any

from pairloop.bench.cells import SAMPLE_CELLS, SampleCell, chosen
from pairloop.bench.models import write_model
from pairloop.bench.race import figures, race, ratios
from pairloop.bench.settings import Settings

OURS, NARROW = "pairloop", "pairloop_bfloat16"
CONTESTANTS = {
    OURS: ("pairloop_sample", "float32"),
    NARROW: ("pairloop_sample", "bfloat16"),
    "generate": ("generate", "float32"),
    "generate_bfloat16": ("generate", "bfloat16"),
    "continuous_batching": ("continuous", "float32"),
}


def bench(settings: Settings) -> list[dict[str, Any]]:
    """One row per cell; every contestant beside `generate` in float32."""
    return [_row(settings, cell) for cell in chosen(SAMPLE_CELLS, settings.cells, settings.device)]


def _row(settings: Settings, cell: SampleCell) -> dict[str, Any]:
    base = {
        "cell": cell.name,
        "device": settings.device,
        "threads": settings.threads,
        "model": str(write_model(settings.folder / cell.shape.name, cell.shape)),
    }
    outcomes = race(
        {name: base | {"contestant": kind, "dtype": dtype} for name, (kind, dtype) in CONTESTANTS.items()},
        settings.folder / "logs" / f"sample-{cell.name}",
        rounds=settings.rounds,
        steps=1,
        threads=settings.threads,
        on_step=settings.on_step,
        title=f"sampling {cell.name}",
    )
    mine, narrow = outcomes[OURS], outcomes[NARROW]
    return {
        "cell": cell.name,
        "prompt_tokens": cell.prompt,
        "prompts": cell.prompts,
        "new_tokens": cell.new_tokens,
        OURS: figures(mine, settings.device, "tokens"),
        NARROW: figures(narrow, settings.device, "tokens")
        | {"ratio_to_generate_bfloat16": ratios(narrow, outcomes["generate_bfloat16"], settings.device)},
        "peers": {
            name: figures(outcome, settings.device, "tokens") | {"ratio": ratios(mine, outcome, settings.device)}
            for name, outcome in outcomes.items()
            if not name.startswith(OURS)
        },
    }
