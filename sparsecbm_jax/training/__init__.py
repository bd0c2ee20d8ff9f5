"""From a config to a trained, pruned, saved model."""

from sparsecbm_jax.config import moved_names
from sparsecbm_jax.training.loop import NonFiniteError
from sparsecbm_jax.training.run import TrainResult, train

__all__ = ["NonFiniteError", "TrainResult", "train"]

__getattr__ = moved_names.raise_for(__name__)
