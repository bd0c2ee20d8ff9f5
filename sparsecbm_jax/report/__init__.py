"""Pages for people: decision pathways as one page, the report of a run as another, and their figures for a paper.

This package only reads results of explanation, correction and evaluation, and the files of a run. It needs the extra
`report`. A name below is imported at its first use: tables alone need no extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecbm_jax.report.document import render_report, write_report
    from sparsecbm_jax.report.gather import RunReport, read_report
    from sparsecbm_jax.report.page import Comparison, predictor_weights, render_page, show, write_page

__all__ = [
    "Comparison",
    "RunReport",
    "predictor_weights",
    "read_report",
    "render_page",
    "render_report",
    "show",
    "write_page",
    "write_report",
]

_FILE_OF = {
    **dict.fromkeys(("render_report", "write_report"), "document"),
    **dict.fromkeys(("RunReport", "read_report"), "gather"),
    **dict.fromkeys(("Comparison", "predictor_weights", "render_page", "show", "write_page"), "page"),
}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILE_OF[name]}"), name)
