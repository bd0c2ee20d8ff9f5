"""The report of a run as one self-contained page.

The page holds its figures and asks nothing of any network; nothing of a review, or of a name, is ever markup.
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
# Pixels from which a figure takes two columns, and is moved rather than shrunk on a phone.
_WIDE = 460


class _Image(NamedTuple):
    """A figure as the page holds it."""

    number: int
    caption: str
    source: str
    width: int
    height: int
    is_wide: bool


def render_report(report: RunReport) -> str:
    """The report as one HTML file, at most `MAX_BYTES` in UTF-8.

    Raises:
        ImportError: if matplotlib is not there to draw its figures.
        ValueError: if it would be larger.
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
    """Writes `render_report` to a file, whose folder is made where it is not there."""
    path, page = Path(path), render_report(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    # As bytes: a text file of some systems would end lines otherwise, and the policy's checksums would not hold.
    path.write_bytes(page.encode())


def _image(figure: Figure, number: int) -> _Image:
    (drawn,) = plots.draw(figure, "svg")
    # Its markup alone: what stands before it names a place on the network, which nothing would ask anyway.
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
