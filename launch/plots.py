"""What plots share: colours that the colour-blind can tell apart, a marker for each, and a word where none is drawn."""

from __future__ import annotations

import types
import typing
from pathlib import Path

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, and a marker each, so that colour never stands alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"


def pyplot() -> types.ModuleType | None:
    """matplotlib's pyplot, drawing to files; None, and a line that says so, where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed (extra 'report')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def style(number: int) -> dict[str, str]:
    """Colour and marker of a series."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def save(figure: Figure, workdir: Path, name: str) -> None:
    """Writes a figure as PNG and as SVG, and says where."""
    for ending in ("png", "svg"):
        figure.savefig(workdir / f"{name}.{ending}", dpi=150)
    print(f"drawn: {workdir / name}.png and .svg")
