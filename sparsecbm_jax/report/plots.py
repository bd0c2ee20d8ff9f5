"""Common parts of figures: colours that the colour-blind can tell apart, a marker for each, files for page and paper.

Without matplotlib (extra `report`) no figure is drawn; nothing else of a report needs it.
"""

import io
import math
import types
import typing
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsecbm_jax.report.elements import Figure

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

# Okabe and Ito's colours, and a marker each, so that no distinction depends on colour alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
# Readable by those who see no colours, and in print: lighter means more.
SEQUENTIAL = "cividis"
GREY = "0.35"
# Inches: a column of a two-column paper, and both.
COLUMN, BOTH = 3.4, 7.0

_SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.4,
    # Letters as TrueType: conferences refuse the fonts that matplotlib embeds by default.
    "pdf.fonttype": 42,
    # Equal figures give equal files.
    "svg.hashsalt": "sparsecbm_jax",
}
_ENDINGS = ("png", "svg", "pdf")
# No dates, and no addresses of the file's writer.
_METADATA = {
    "png": {"Software": None},
    "svg": {"Creator": None, "Date": None, "Format": None, "Type": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}


def pyplot() -> types.ModuleType:
    """Returns matplotlib's pyplot, drawing to files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ImportError("figures need matplotlib: pip install 'sparsecbm-jax[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def style(number: int) -> dict[str, str]:
    """Returns colour and marker of a series by its number, from 0."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def label(name: str, most: int = 24) -> str:
    r"""Makes a name fit for a figure: cuts it after `most` characters, and escapes dollar signs, which begin formulas.

    >>> label("a" * 30, 5), label("$")
    ('aaaa…', '\\$')
    """
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")


def tidy(axes: Iterable["Axes"]) -> None:
    """Gives axes a faint grid, and removes the frame on sides without an axis."""
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)


def legend(figure: "MatplotlibFigure") -> None:
    """Adds a legend of the series of all axes, above them, in as few lines as fit."""
    found = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if not found:
        return
    # Inches of a marker and its gaps, and of a letter.
    width = sum(0.38 + 0.06 * len(label) for label in found)
    num_lines = math.ceil(width / figure.get_figwidth())
    layout = {"columnspacing": 1.0, "handlelength": 1.6, "handletextpad": 0.5, "frameon": False}
    columns = math.ceil(len(found) / num_lines)
    figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=columns, **layout)


def draw(figure: Figure, *endings: str) -> tuple[bytes, ...]:
    """Draws a figure and returns the content of a file for each ending: 'png', 'svg' or 'pdf'."""
    plt, found = pyplot(), []
    with plt.rc_context(_SETTINGS), warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes; the figure's table has the name.
        warnings.filterwarnings("ignore", message="Glyph")
        drawn = figure.draw(plt)
        for ending in endings:
            content = io.BytesIO()
            drawn.savefig(content, format=ending, dpi=200, metadata=_METADATA[ending])
            found.append(content.getvalue())
        plt.close(drawn)
    return tuple(found)


def write(figures: Sequence[Figure], folder: Path) -> None:
    """Writes figures as PNG, SVG and PDF and prints their paths, or that matplotlib is not installed."""
    try:
        for figure in figures:
            contents = draw(figure, *_ENDINGS)
            folder.mkdir(parents=True, exist_ok=True)
            for ending, content in zip(_ENDINGS, contents, strict=True):
                (folder / f"{figure.name}.{ending}").write_bytes(content)
            print(f"drawn: {folder / figure.name}.png, .svg and .pdf")
    except ImportError as error:
        print(f"no plot: {error}")
