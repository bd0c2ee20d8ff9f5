"""What people read: decision pathways as one self-contained page, to save, print and send.

This room only reads what explanation and correction return. It needs the extra `report`.
"""

from sparsecbm_jax.report.page import Comparison, predictor_weights, render_page, show, write_page

__all__ = ["Comparison", "predictor_weights", "render_page", "show", "write_page"]
