"""Memory, traffic and speed of a run's programs, compiled ahead of time for devices that need not be available."""

from sparsecbm_jax.config import moved_names

__getattr__ = moved_names.raise_for(__name__)
