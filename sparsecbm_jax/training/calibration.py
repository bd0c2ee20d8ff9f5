"""Temperatures, fitted on held-out texts, so that predicted probabilities are as often right as they say.

Reference: Guo et al. 2017, 'On Calibration of Modern Neural Networks': one temperature T, softmax(u / T).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

from sparsecbm_jax.model.config import Heads

# A split of fewer labels says too little.
MIN_LABELS = 20
_LOG_RANGE = (-3.0, 4.0)


def temperature(logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> float:
    """Finds the T at which softmax(u / T) has the least cross-entropy; 1 where there are fewer than 20 labels.

    Args:
        logits: u.
        labels: classes; rows with a negative one do not count.

    >>> import numpy as np
    >>> labels = np.arange(60) % 3
    >>> logits = 9.0 * np.eye(3)[np.where(np.arange(60) % 5, labels, (labels + 1) % 3)]  # right in 4 of 5
    >>> round(9.0 / temperature(logits, labels), 1)  # e^2.1 / (e^2.1 + 2) = 0.8
    2.1
    """
    known = labels >= 0
    if known.sum() < MIN_LABELS:
        return 1.0
    u, gold = np.asarray(logits, float)[known], labels[known]
    found = optimize.minimize_scalar(
        lambda log_t: log_loss(u / np.exp(log_t), gold), bounds=_LOG_RANGE, method="bounded"
    )
    return float(np.exp(found.x))


def log_loss(logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> float:
    """Computes the mean cross-entropy of softmax(u), in nats."""
    u = logits - logits.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(u).sum(axis=1)) - u[np.arange(len(u)), labels]))


def calibrated(heads: Heads, name: str, temperatures: Float[np.ndarray, "..."]) -> dict[str, Any]:
    """Returns heads one of whose parts computes u / T in place of u: its kernel and bias are divided by T.

    Args:
        heads: the heads.
        name: 'projector', with a temperature for each concept, or 'predictor' or 'classifier', with one.
        temperatures: T.
    """
    part: Mapping[str, Any] = heads[name]
    divided = {}
    for key, leaf in part.items():
        values = np.asarray(temperatures, np.float32)
        divided[key] = leaf / values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim))
    return {**heads, name: divided}
