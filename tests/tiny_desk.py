"""What the live page's tests serve: a tiny model that reads a few tokens, texts held out, and one that is hostile."""

import dataclasses

import numpy as np
from tiny_model import TEXTS, tiny_model

from sparsecbm_jax import artifact
from sparsecbm_jax.data.schema import Examples

HOSTILE = """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> 'a' & {{ 7 * 7 }}"""


def model() -> artifact.SparseCBM:
    """Reads texts padded or cut to 24 tokens: one width to compile for, which is other tests' too."""
    return dataclasses.replace(tiny_model(num_layers=1), metadata={"max_length": 24, "buckets": (24,)})


def sample() -> Examples:
    return Examples(TEXTS, np.zeros((4, 3), np.int32), np.zeros(4, np.int32), None, np.arange(4, dtype=np.int32) + 7)
