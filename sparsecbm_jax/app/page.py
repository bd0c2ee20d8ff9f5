"""The live page: the static page's template, styles and scripts, with a form and a script that asks the API."""

import jinja2

from sparsecbm_jax.app.security import Limits
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.report.page import TEMPLATES, fill, predictor_weights

_BOTH = jinja2.ChoiceLoader([jinja2.PackageLoader(__package__), TEMPLATES])


def live_page(model: SparseCBM, title: str, limits: Limits, *, is_lasting: bool) -> tuple[str, str]:
    """The page, which corrections do not change, and its content-security policy: it may ask this server alone.

    Args:
        is_lasting: each correction keeps those before it in force.
    """
    schema = model.schema
    content = {
        "pathways": [],
        "corrections": [],
        "predictor": predictor_weights(model),
        "concepts": schema.concepts,
        "classes": schema.classes,
        "max_text": limits.max_text,
        "is_lasting": is_lasting,
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
        is_lasting=is_lasting,
    )
    # What browsers take from a header alone.
    return page, f"{policy}; frame-ancestors 'none'"
