"""SparseCBM: K masked passes of one backbone, the concept bottleneck, the label; how it is saved and read."""

from sparsecbm_jax.model.config import CBMConfig, CBMOutput, Heads
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.model.predictions import Predictions, predict
from sparsecbm_jax.model.saved_model import ArtifactError, load, save
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM

__all__ = [
    "ArtifactError",
    "CBMConfig",
    "CBMOutput",
    "Heads",
    "ModelArrays",
    "Predictions",
    "SparseCBM",
    "init_heads",
    "load",
    "make_forward",
    "predict",
    "save",
]
