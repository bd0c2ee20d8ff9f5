"""Edits of a concept's mask, on arrays: editors, rankings, costs; stored edits and their log."""

from sparsecbm_jax.config import moved_names
from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.intervention.fixed_size_edit import intervene
from sparsecbm_jax.intervention.mask_edit import MaskEdit
from sparsecbm_jax.intervention.stored_edit import StoredEdit

__all__ = ["EditLog", "MaskEdit", "StoredEdit", "intervene"]

__getattr__ = moved_names.raise_for(__name__)
