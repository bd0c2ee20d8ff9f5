"""Decision pathways as one page: no network, opens from disk, recomputes the label where a concept is set.

The page holds `to_dict()` of what it was given as JSON, and a script that draws it; nothing of a review is ever markup.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsecbm_jax.correction.edit_view import EditChange
from sparsecbm_jax.correction.report import CorrectionReport
from sparsecbm_jax.explanation.pathways import DecisionPathway
from sparsecbm_jax.model.sparse_cbm import SparseCBM

try:
    import jinja2
except ImportError:
    raise ImportError("the page needs jinja2: pip install 'sparsecbm-jax[report]'") from None

MAX_BYTES = 2_000_000
TEMPLATES = jinja2.PackageLoader(__package__)

# In a script element only these can end it, or begin a comment; the two separators once ended a line of JavaScript.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}

Predictor = Mapping[str, Mapping[str, Mapping[str, float]]]


class Comparison(NamedTuple):
    """One correction, with the pathway of its text before and after, and where it changed the concept's mask."""

    report: CorrectionReport
    before: DecisionPathway
    after: DecisionPathway
    change: EditChange | None = None


def predictor_weights(model: SparseCBM) -> dict[str, dict[str, dict[str, float]]]:
    """The label predictor's φ by concept, class and label: all that the page needs to set a concept."""
    schema, kernel = model.schema, np.asarray(model.heads["predictor"]["kernel"])
    return {
        concept: {
            name: dict(zip(schema.labels, kernel[k, c].tolist(), strict=True)) for c, name in enumerate(schema.classes)
        }
        for k, concept in enumerate(schema.concepts)
    }


def render_page(
    pathways: Sequence[DecisionPathway],
    corrections: Sequence[Comparison] = (),
    *,
    predictor: Predictor | None = None,
    title: str = "Decision pathways",
) -> str:
    r"""One HTML file that shows pathways, and corrections before and after, one at a time.

    Setting concept k to class c makes $a_k$ one-hot: its contribution $a_k \varphi_k$ becomes $\varphi_{k,c}$, and the
    label $y = \varphi_0 + \sum_k a_k \varphi_k$ follows without the language model.

    Args:
        pathways: what `explain` returned.
        corrections: edits to show before them, each with two pathways of its own.
        predictor: `predictor_weights` of the model; without it no concept can be set.
        title: the page's heading.

    Returns:
        A page of at most `MAX_BYTES` in UTF-8. Where all would be more, the last pathways are left out, and it says so.

    Raises:
        ValueError: if there is nothing to show, or the first alone is too large.
    """
    return _render_what_fits(pathways, corrections, predictor, title)[0]


def write_page(
    path: str | Path,
    pathways: Sequence[DecisionPathway],
    corrections: Sequence[Comparison] = (),
    *,
    predictor: Predictor | None = None,
    title: str = "Decision pathways",
) -> int:
    """Writes `render_page` to a file, whose folder is made where it is not there.

    Returns:
        How many of the pathways the page shows: all, or as many as fit.
    """
    page, num_shown = _render_what_fits(pathways, corrections, predictor, title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # As bytes: a text file of some systems would end lines otherwise, and the policy's checksums would not hold.
    path.write_bytes(page.encode())
    return num_shown


class Frame(NamedTuple):
    """A page in a notebook's cell, apart from the notebook's own scripts and styles."""

    page: str
    height: int

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.page)}" sandbox="allow-scripts" title="Decision pathway" '
            f'width="100%" height="{self.height}" style="border: 0"></iframe>'
        )


def show(pathway: DecisionPathway | Comparison, *, predictor: Predictor | None = None, height: int = 900) -> Frame:
    """A pathway, or a correction before and after, for the last line of a notebook's cell.

    Args:
        pathway: what to show.
        predictor: `predictor_weights` of the model; without it no concept can be set.
        height: of the frame, in pixels.
    """
    if isinstance(pathway, Comparison):
        return Frame(render_page([], [pathway], predictor=predictor), height)
    return Frame(render_page([pathway], predictor=predictor), height)


def _render_what_fits(
    pathways: Sequence[DecisionPathway], corrections: Sequence[Comparison], predictor: Predictor | None, title: str
) -> tuple[str, int]:
    """The page and how many pathways it shows."""
    if not pathways and not corrections:
        raise ValueError("there is no pathway to show; expected at least one")
    num_shown = len(pathways)
    while True:
        page = _render(pathways[:num_shown], corrections, predictor, title, len(pathways) - num_shown)
        size = len(page.encode())
        if size <= MAX_BYTES:
            return page, num_shown
        # What all pathways share is small: a few rounds find how many fit.
        num_shown = min(num_shown - 1, num_shown * MAX_BYTES // size)
        if num_shown < (0 if corrections else 1):
            raise ValueError(f"the page would have {size:,} bytes; at most {MAX_BYTES:,} are allowed")


def _render(
    pathways: Sequence[DecisionPathway],
    corrections: Sequence[Comparison],
    predictor: Predictor | None,
    title: str,
    num_omitted: int,
) -> str:
    content = {
        "pathways": [pathway.to_dict() for pathway in pathways],
        "corrections": [
            {name: None if part is None else part.to_dict() for name, part in one._asdict().items()}
            for one in corrections
        ],
        "predictor": predictor,
    }
    return fill(TEMPLATES, "page.html", content, title, num_pathways=len(pathways), num_omitted=num_omitted)[0]


def fill(
    templates: jinja2.BaseLoader,
    name: str,
    content: Any,
    title: str,
    *,
    styles: Sequence[str] = ("page.css",),
    scripts: Sequence[str] = ("page.js",),
    allowed: str = "",
    **values: Any,
) -> tuple[str, str]:
    """A template with its styles and scripts in it.

    Args:
        templates: where all are looked for.
        name: of the template.
        content: what the scripts find as JSON.
        title: the page's heading.
        styles, scripts: names of files, in order.
        allowed: what the policy allows beside them, such as "connect-src 'self'; ".
        values: what else the template asks for.

    Returns:
        The page, and its content-security policy.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=templates)
    style, script = ("".join(_source(environment, one) for one in names) for names in (styles, scripts))
    policy = (
        f"default-src 'none'; script-src {_checksum(script)}; style-src {_checksum(style)}; {allowed}"
        "base-uri 'none'; form-action 'none'"
    )
    page = environment.get_template(name).render(
        title=title, policy=policy, style=style, script=script, content=embed_json(content), **values
    )
    return page, policy


def embed_json(content: Any) -> str:
    """JSON that may stand in a script element, whatever its strings hold.

    >>> print(embed_json("</script> & more"))
    "\\u003c/script\\u003e \\u0026 more"
    """
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _checksum(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _source(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    # Browsers end lines so before they take a checksum.
    return environment.loader.get_source(environment, name)[0].replace("\r\n", "\n")
