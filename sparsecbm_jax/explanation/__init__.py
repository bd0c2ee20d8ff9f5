"""Explanations of a model's decisions: words, subnetworks, concepts, label."""

from sparsecbm_jax.config import moved_names
from sparsecbm_jax.explanation.as_text import render_text
from sparsecbm_jax.explanation.attribution import Attribution
from sparsecbm_jax.explanation.pathways import ConceptPathway, DecisionPathway, explain, explain_stream
from sparsecbm_jax.explanation.uncertainty import UnsurePrediction, unsure_predictions

__all__ = [
    "Attribution",
    "ConceptPathway",
    "DecisionPathway",
    "UnsurePrediction",
    "explain",
    "explain_stream",
    "render_text",
    "unsure_predictions",
]

__getattr__ = moved_names.raise_for(__name__)
