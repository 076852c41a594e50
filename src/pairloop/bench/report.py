"""What a benchmark leaves behind: the JSON document, a page of Markdown tables, and a picture of the ratios."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pairloop.bench.settings import Settings

JSON_FILE, PAGE_FILE, PLOT_FILE = "bench.json", "bench.md", "bench.png"
LIBRARIES = ("torch", "transformers", "peft", "trl")
PEERS = {"trl_default": "TRL as installed", "trl_best": "TRL at its best", "generate": "generate"}
HEADERS = {
    "training": (
        "cell", "mode", "pairs/s", "of ceiling", "TRL installed", "ratio", "TRL best", "ratio, pass counted", "net MB", "share",
    ),
    "sampling": (
        "cell", "tokens/s", "generate", "ratio", "continuous batching", "ratio", "bf16 tokens/s", "ratio to generate in bf16",
    ),
    "loop": ("", "CPU s", "wall s", "peak MB", "training CPU s", "win rate", "utility"),
}  # fmt: skip
SEARCH_HEADERS = ("cell", "mode", "change", "outcome")


def document(settings: Settings, **parts: Any) -> dict[str, Any]:
    """The figures with when, where and with what they were measured."""
    return {
        **machine(settings.device),
        "threads": settings.threads,
        "quick": settings.quick,
        "libraries": {name: _version(name) for name in LIBRARIES},
        **parts,
    }


def machine(device: str) -> dict[str, str]:
    """When and where something is measured."""
    return {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "device": _device(device)}


def write(found: Mapping[str, Any], out: Path) -> list[Path]:
    """The three files in ``out``; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    (out / JSON_FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / PAGE_FILE).write_text(page(found), encoding="utf-8")
    draw(found, out / PLOT_FILE)
    return [out / JSON_FILE, out / PAGE_FILE, out / PLOT_FILE]


def tables(found: Mapping[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """Title → rows, below `HEADERS`, of what was measured."""
    makers = {"training": ("cells", _training_row), "sampling": ("sampling", _sampling_row)}
    made = {title: [row(cell) for cell in found[key]] for title, (key, row) in makers.items() if found.get(key)}
    if "loop" in found:
        made["loop"] = _loop_rows(found["loop"])
    return made


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The ratios with their spread, one dot per cell and peer."""
    from matplotlib.figure import Figure

    rows = [*_dots(found.get("cells", ()), ("trl_default", "trl_best")), *_dots(found.get("sampling", ()), ("generate",))]
    figure = Figure(figsize=(7.2, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (_, ratio) in enumerate(rows):
        spread = [[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]]
        axes.errorbar(ratio["median"], -y, xerr=spread, fmt="o", color="#2a6f97", capsize=3)
    axes.set_yticks([-y for y in range(len(rows))], [name for name, _ in rows])
    axes.axvline(1.0, color="#888888", linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("times the peer's speed: median of the turns, smallest and largest")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _dots(cells: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> list[tuple[str, Mapping[str, float]]]:
    return [
        (f"{cell['cell']} {cell.get('mode', 'sampling')}, over {PEERS[peer]}", cell["peers"][peer]["ratio"])
        for cell in cells
        for peer in peers
    ]


def _training_row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    ours, default, best = cell["pairloop"], cell["peers"]["trl_default"], cell["peers"]["trl_best"]
    return (
        cell["cell"],
        cell["mode"],
        _rate(ours),
        f"{100 * ours['flop_use']:.0f} %",
        _rate(default),
        _ratio(default["ratio"]),
        _rate(best),
        _ratio(best["ratio"]),
        f"{ours['net_mb']:.0f}",
        f"{default['memory_ratio']:.2f} / {best['memory_ratio']:.2f}",
    )


def _sampling_row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    ours, narrow, peers = cell["pairloop"], cell["pairloop_bfloat16"], cell["peers"]
    return (
        cell["cell"],
        _rate(ours),
        _rate(peers["generate"]),
        _ratio(peers["generate"]["ratio"]),
        _rate(peers["continuous_batching"]),
        _ratio(peers["continuous_batching"]["ratio"]),
        _rate(narrow),
        _ratio(narrow["ratio_to_generate_bfloat16"]),
    )


def _loop_rows(loop: Mapping[str, Any]) -> list[tuple[str, ...]]:
    contestants = {"pairloop demo": loop["pairloop"], **loop["peers"]}
    return [
        (
            name,
            f"{found['cpu_s']:.0f}",
            f"{found['wall_s']:.0f}",
            f"{found['peak_mb']:.0f}",
            f"{found.get('training_cpu_s', found.get('cpu_s_by_phase', {}).get('training', 0.0)):.1f}",
            f"{found['win_rate']:.3f}",
            f"{found['utility']:.2f}",
        )
        for name, found in contestants.items()
    ]


def _rate(figures: Mapping[str, Any]) -> str:
    """Units per second of the CPU, or of the clock on another device."""
    rate = next(value for name, value in figures.items() if name.endswith("_s") and "_per_" in name)
    return f"{rate:,.0f}" if rate >= 1_000 else f"{rate:.3g}"


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"


def page(found: Mapping[str, Any], plot: str = PLOT_FILE) -> str:
    """The tables in Markdown, with what the search for the peer's settings tried; ``plot``: where the picture lies."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    lines = [
        "# Benchmark",
        "",
        f"Measured {found['measured_at']} on {found['device']}, {found['threads']} thread(s), {libraries}. "
        "Contestants take turns on the same data, model and thread count; a ratio is taken turn by turn: "
        "median [smallest, largest]. Of ceiling: floating-point operations done, of what a large matrix product does here. "
        "Net MB: peak above what was held before the first step; share: of TRL's, as installed / best.",
        "",
        f"![ratios]({plot})",
    ]
    for title, rows in tables(found).items():
        lines += ["", f"## {title.capitalize()}", "", *_markdown(HEADERS[title], rows)]
    if "loop" in found:
        steps = found["loop"]["pairloop"]["last_pick_to_new_version_s"]
        told = ", ".join(f"{step} {seconds:.1f}" for step, seconds in steps.items())
        pairs = ", ".join(map(str, found["loop"]["pairloop"]["pairs"]))
        lines += ["", f"From the last pick to the new version, seconds by step, mean of the rounds ({pairs} pairs): {told}."]
    searched = [cell for cell in found.get("cells", ()) if cell["peers"]["trl_best"].get("tried")]
    if searched:
        lines += ["", "## How TRL's best settings were found", "", *_markdown(SEARCH_HEADERS, _search_rows(searched))]
    return "\n".join(lines) + "\n"


def _search_rows(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Each change once per model and mode, on the cell on which it was tried."""
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for cell in cells:
        first.setdefault((cell["cell"].split("-")[0], cell["mode"]), cell)
    return [
        (cell["cell"], cell["mode"], trial["change"], _outcome(trial))
        for cell in first.values()
        for trial in cell["peers"]["trl_best"]["tried"]
    ]


def _outcome(trial: Mapping[str, Any]) -> str:
    if "refused" in trial:
        return f"does not run: {trial['refused'].split('(')[0].strip()}"
    kept = {True: ", kept", False: ", dropped", None: ""}[trial.get("kept")]
    return f"{trial['pairs_per_s']:.3g} pairs/s{kept}"


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _device(device: str) -> str:
    if device == "cpu":
        return _processor()
    import torch

    return torch.cuda.get_device_name()


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return name or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
