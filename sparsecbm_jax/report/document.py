"""The report of a run as one self-contained page.

The page holds its figures and makes no network request; text of a review, or a name, is never markup.
"""

import base64
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from sparsecbm_jax.report import plots
from sparsecbm_jax.report.elements import Figure
from sparsecbm_jax.report.gather import RunReport
from sparsecbm_jax.report.page import MAX_BYTES, TEMPLATES, fill

# CSS pixels to a point, of which 72 make an inch: a figure's letters become as large as the page's small ones.
_PIXELS = 1.45
# Pixels from which a figure takes two columns, and scrolls rather than shrinks on a phone.
_WIDE = 460


class _Image(NamedTuple):
    """A figure as it is embedded in the page."""

    number: int
    caption: str
    source: str
    width: int
    height: int
    is_wide: bool


def render_report(report: RunReport) -> str:
    """Renders the report as one HTML file, at most `MAX_BYTES` in UTF-8.

    Raises:
        ImportError: Its figures need matplotlib, which is not installed.
        ValueError: The file would be larger.
    """
    pathways = [pathway for section in report.sections for pathway in section.pathways]
    content = {
        "pathways": [pathway.to_dict() for pathway in pathways],
        "corrections": [],
        "predictor": report.predictor,
    }
    numbers = itertools.count(1)
    page, _ = fill(
        TEMPLATES,
        "report.html",
        content,
        report.title,
        styles=("page.css", "report.css"),
        allowed="img-src data:; ",
        report=report,
        sections=[
            (f"section-{n}", one, [_image(figure, next(numbers)) for figure in one.figures])
            for n, one in enumerate(report.sections, 1)
        ],
    )
    size = len(page.encode())
    if size > MAX_BYTES:
        raise ValueError(f"the report would have {size:,} bytes; at most {MAX_BYTES:,} are allowed")
    return page


def write_report(path: str | Path, report: RunReport) -> None:
    """Writes `render_report` to a file; its folder is made if absent."""
    path, page = Path(path), render_report(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    # As bytes: in text mode some systems change line ends, and the policy's checksums would be wrong.
    path.write_bytes(page.encode())


def _image(figure: Figure, number: int) -> _Image:
    (drawn,) = plots.draw(figure, "svg")
    # The markup alone: the lines before it name an address on the network.
    drawn = drawn[drawn.index(b"<svg") :]
    size = re.search(rb'width="([\d.]+)pt" height="([\d.]+)pt"', drawn)
    assert size is not None
    width, height = (round(_PIXELS * float(points)) for points in size.groups())
    return _Image(
        number,
        figure.caption,
        f"data:image/svg+xml;base64,{base64.b64encode(drawn).decode()}",
        width,
        height,
        width > _WIDE,
    )
