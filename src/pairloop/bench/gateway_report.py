"""The gateway's figures as tables and as a section of the benchmark's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADERS = (
    "reply", "clients", "CPU ms", "bare", "added", "p50 ms", "bare", "added", "p99 ms", "p99 / p50", "requests/s",
)  # fmt: skip
MEMORY_HEADERS = ("requests", "RSS MB")


def tables(found: Mapping[str, Any]) -> list[tuple[Sequence[str], list[tuple[str, ...]]]]:
    """(headers, rows) of CPU and latency and, where it was measured, of memory."""
    made: list[tuple[Sequence[str], list[tuple[str, ...]]]] = [(HEADERS, [_row(cell) for cell in found["cells"]])]
    if "memory" in found:
        made.append((MEMORY_HEADERS, [(f"{row['requests']:,}", f"{row['rss_mb']:.1f}") for row in found["memory"]]))
    return made


def sentence(found: Mapping[str, Any]) -> str:
    """What the figures are to be read beside."""
    return (
        f"One commit of a group, alone on the same disk: {spread(found['commit_ms'])} ms. Before the run the machine's load "
        f"average was {found['load_average']} on {found['processors']} processors: what others do there lengthens the tails."
    )


def section(document: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown."""
    found = document["gateway"]
    lines = [
        "",
        "## Gateway",
        "",
        f"Measured {document['measured_at']} on {document['device']}: `pairloop serve` with the fake policy, two answers to "
        "each request, each group stored durably, beside a server of the same kind that answers the same bytes and does "
        "nothing else. Both are processes of their own and take turns; p50 and p99 of a stream are those of its first event. "
        f"{sentence(found)}",
    ]
    for headers, rows in tables(found):
        lines += ["", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return lines


def _row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    ours, bare, added = cell["pairloop"], cell["bare"], cell["added"]
    return (
        cell["kind"],
        str(cell["clients"]),
        spread(ours["cpu_ms"]),
        spread(bare["cpu_ms"]),
        spread(added["cpu_ms"]),
        spread(ours["p50_ms"]),
        spread(bare["p50_ms"]),
        spread(added["p50_ms"]),
        spread(ours["p99_ms"]),
        spread(cell["p99_over_p50"]),
        f"{ours['requests_per_s']['median']:,.0f}",
    )


def spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} [{values['min']:.2f}, {values['max']:.2f}]"
