"""Scores of models and of corrections, and their baselines."""

from sparsecbm_jax.config import moved_names
from sparsecbm_jax.evaluation.scores import evaluate
from sparsecbm_jax.evaluation.tables import render_table

__all__ = ["evaluate", "render_table"]

__getattr__ = moved_names.raise_for(__name__)
