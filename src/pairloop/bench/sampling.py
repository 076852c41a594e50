"""Sampling beside transformers: tokens per second, two completions of every prompt, cell by cell."""

from __future__ import annotations

from typing import Any

from pairloop.bench.cells import SAMPLE_CELLS, SampleCell, chosen
from pairloop.bench.models import write_model
from pairloop.bench.race import Outcome, race, ratios, spread
from pairloop.bench.settings import Settings

OURS = "pairloop"
CONTESTANTS = {
    OURS: ("pairloop_sample", "float32"),
    "pairloop_bfloat16": ("pairloop_sample", "bfloat16"),
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
    unit = f"tokens_per_{'cpu_' if settings.device == 'cpu' else ''}s"
    mine = outcomes[OURS]
    return {
        "cell": cell.name,
        "prompt_tokens": cell.prompt,
        "prompts": cell.prompts,
        "new_tokens": cell.new_tokens,
        OURS: _figures(mine, settings.device, unit),
        "pairloop_bfloat16": _figures(outcomes["pairloop_bfloat16"], settings.device, unit)
        | {"ratio_to_generate_bfloat16": _ratio(outcomes, "pairloop_bfloat16", "generate_bfloat16", settings.device)},
        "peers": {
            name: _figures(outcome, settings.device, unit) | {"ratio": ratios(mine, outcome, settings.device)}
            for name, outcome in outcomes.items()
            if not name.startswith(OURS)
        },
    }


def _ratio(outcomes: dict[str, Outcome], ours: str, peer: str, device: str) -> dict[str, float]:
    return ratios(outcomes[ours], outcomes[peer], device)


def _figures(outcome: Outcome, device: str, unit: str) -> dict[str, Any]:
    rates = spread([1 / turn.cost(device) for turn in outcome.turns])
    return {
        unit: rates["median"],
        "spread": rates,
        "tokens_per_wall_s": spread([turn.units / turn.wall_s for turn in outcome.turns])["median"],
        "peak_mb": max(turn.peak_mb for turn in outcome.turns),
        "net_mb": max(turn.net_mb for turn in outcome.turns),
    }
