"""Will it fit, and how fast can it be: programs compiled ahead of time for devices that are not there."""

from sparsecbm_jax.config import moved_names

__getattr__ = moved_names.raise_for(__name__)
