"""The live page: the static page's template, styles and scripts, with a form and a script that calls the API."""

import jinja2

from sparsecbm_jax.app.security import Limits
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.report.page import TEMPLATES, fill, predictor_weights

_BOTH = jinja2.ChoiceLoader([jinja2.PackageLoader(__package__), TEMPLATES])


def live_page(model: SparseCBM, title: str, limits: Limits, *, keeps_earlier: bool) -> tuple[str, str]:
    """Renders the page, which corrections do not change, and its content-security policy.

    The policy lets the page call this server alone.

    Args:
        model: The model, for the names of concepts and classes.
        title: The page's heading.
        limits: The server's limits.
        keeps_earlier: True where each correction is made together with the earlier ones.
    """
    schema = model.schema
    content = {
        "pathways": [],
        "corrections": [],
        "predictor": predictor_weights(model),
        "concepts": schema.concepts,
        "classes": schema.classes,
        "max_text": limits.max_text,
        "keeps_earlier": keeps_earlier,
    }
    page, policy = fill(
        _BOTH,
        "live.html",
        content,
        title,
        styles=("page.css", "live.css"),
        scripts=("page.js", "live.js"),
        allowed="connect-src 'self'; ",
        num_omitted=0,
        keeps_earlier=keeps_earlier,
    )
    # Browsers accept this directive in a header only.
    return page, f"{policy}; frame-ancestors 'none'"
