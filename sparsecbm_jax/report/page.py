"""Decision pathways as one page: it needs no network, opens from disk, and recomputes the label if a concept is set.

The page holds `to_dict()` of its pathways as JSON, and a script that draws them; text of a review is never markup.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsecbm_jax.correction.edit_view import EditChange
from sparsecbm_jax.correction.report import CorrectionReport
from sparsecbm_jax.explanation.contributions import Reference, reference_of, set_contributions
from sparsecbm_jax.explanation.pathways import DecisionPathway
from sparsecbm_jax.model.sparse_cbm import SparseCBM

try:
    import jinja2
except ImportError:
    raise ImportError("the page needs jinja2: pip install 'sparsecbm-jax[report]'") from None

MAX_BYTES = 2_000_000
TEMPLATES = jinja2.PackageLoader(__package__)

# Only these can end a script element or begin a comment in it; in old JavaScript the two separators ended a line.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}

Predictor = Mapping[str, Mapping[str, Mapping[str, float]]]


class Comparison(NamedTuple):
    """One correction, with the pathway of its text before and after, and the changes of the concept's mask."""

    report: CorrectionReport
    before: DecisionPathway
    after: DecisionPathway
    change: EditChange | None = None


def predictor_weights(model: SparseCBM, reference: Reference | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Returns what a concept contributes where it is set to a class, by concept, class and label.

    Args:
        model: The model.
        reference: Where contributions are counted from, as in the pathways that are shown; see `explain`.
    """
    schema, parts = model.schema, set_contributions(model, reference_of(model, reference))
    return {
        concept: {
            name: dict(zip(schema.labels, parts[k, c].tolist(), strict=True)) for c, name in enumerate(schema.classes)
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
    """Renders one HTML file that shows pathways, and corrections before and after, one at a time.

    Setting concept k to class c gives it the activations that it has on average where it is read as c; the label
    y = φ_0 + Σ_k a_k φ_k follows without the language model.

    Args:
        pathways: The pathways, from `explain`.
        corrections: Edits to show before them, each with two pathways of its own.
        predictor: `predictor_weights` of the model; without it no concept can be set.
        title: The page's heading.

    Returns:
        A page of at most `MAX_BYTES` in UTF-8. If all pathways are more, the last are left out, and the page says so.

    Raises:
        ValueError: There is nothing to show, or the first pathway alone is too large.
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
    """Writes `render_page` to a file; its folder is made if absent.

    Args:
        path: The file.
        pathways: The pathways, from `explain`.
        corrections: Edits to show before them.
        predictor: `predictor_weights` of the model; without it no concept can be set.
        title: The page's heading.

    Returns:
        The number of pathways that the page shows: all, or as many as fit.

    Raises:
        ValueError: As `render_page`.
    """
    page, num_shown = _render_what_fits(pathways, corrections, predictor, title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # As bytes: in text mode some systems change line ends, and the policy's checksums would be wrong.
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
    """Makes a frame of a pathway, or of a correction before and after, for the last line of a notebook's cell.

    Args:
        pathway: The pathway or correction.
        predictor: `predictor_weights` of the model; without it no concept can be set.
        height: Height of the frame, in pixels.
    """
    if isinstance(pathway, Comparison):
        return Frame(render_page([], [pathway], predictor=predictor), height)
    return Frame(render_page([pathway], predictor=predictor), height)


def _render_what_fits(
    pathways: Sequence[DecisionPathway], corrections: Sequence[Comparison], predictor: Predictor | None, title: str
) -> tuple[str, int]:
    """Renders the page with as many pathways as fit, and returns it with their number."""
    if not pathways and not corrections:
        raise ValueError("there is no pathway to show; expected at least one")
    num_shown = len(pathways)
    while True:
        page = _render(pathways[:num_shown], corrections, predictor, title, len(pathways) - num_shown)
        size = len(page.encode())
        if size <= MAX_BYTES:
            return page, num_shown
        # The part that all pathways share is small: a few rounds find the number that fits.
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
    """Fills a template, with its styles and scripts inside.

    Args:
        templates: Loader of templates, styles and scripts.
        name: Name of the template.
        content: JSON values that the scripts read.
        title: The page's heading.
        styles: Names of style sheets, in order.
        scripts: Names of scripts, in order.
        allowed: Sources that the policy allows in addition, such as "connect-src 'self'; ".
        **values: Other values of the template.

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
    r"""Encodes JSON so that it may stand in a script element, whatever its strings hold.

    >>> print(embed_json("</script> & more"))
    "\u003c/script\u003e \u0026 more"
    """
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _checksum(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _source(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    # Browsers normalise line ends so before they compute a checksum.
    return environment.loader.get_source(environment, name)[0].replace("\r\n", "\n")
