"""Corrections by name, for people: one concept of one text is to have another class."""

from sparsecbm_jax.config import moved_names
from sparsecbm_jax.correction.corrections import correct
from sparsecbm_jax.correction.report import CorrectionReport, TextPrediction
from sparsecbm_jax.correction.request_file import CorrectionRequest, RequestFile

__all__ = ["CorrectionReport", "CorrectionRequest", "RequestFile", "TextPrediction", "correct"]

__getattr__ = moved_names.raise_for(__name__)
