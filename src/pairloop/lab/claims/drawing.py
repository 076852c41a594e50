"""One look for every plot, and the same bytes for the same numbers: no clock and no program version in the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, GREEN, RED, GREY = "#3b6fb6", "#1a7f5a", "#b0413e", "#9aa5b1"


@contextmanager
def axes(path: Path, *, xlabel: str, ylabel: str, width: float = 6.4, height: float = 3.8) -> Iterator[Axes]:
    """Axes to draw on; saved as a PNG with a legend when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    plot.set(xlabel=xlabel, ylabel=ylabel)
    plot.spines[["top", "right"]].set_visible(False)
    yield plot
    if plot.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})
