"""WoodFisher's algebra of one block in plain numpy, from the quadratic ½ δᵀ F δ and not from an inverse of F."""

from collections.abc import Sequence

import numpy as np


def from_blocks(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A kernel of `shape` from blocks of consecutive inputs: of each layer, first the first block of all outputs."""
    *layers, inputs, outputs = shape
    size = blocks.shape[1]
    kernel, waiting = (
        np.zeros((int(np.prod(layers, dtype=int)), inputs, outputs), blocks.dtype),
        iter(np.asarray(blocks)),
    )
    for layer in kernel:
        for start in range(0, inputs, size):
            for output in range(outputs):
                layer[start : start + size, output] = next(waiting)[: inputs - start]
    assert next(waiting, None) is None
    return kernel.reshape(shape)


def optimal_update(weights: np.ndarray, fisher: np.ndarray, group: Sequence[int] | np.ndarray) -> np.ndarray:
    """δ with δ_Q = −w_Q whose other entries make ½ δᵀ F δ least (Eq. 10)."""
    group = np.asarray(group, int)
    rest = np.setdiff1d(np.arange(len(weights)), group)
    delta = np.zeros(len(weights))
    delta[group] = -weights[group]
    delta[rest] = -np.linalg.solve(fisher[np.ix_(rest, rest)], fisher[np.ix_(rest, group)] @ delta[group])
    return delta


def loss_increase(weights: np.ndarray, fisher: np.ndarray, group: Sequence[int] | np.ndarray) -> float:
    """½ δᵀ F δ at its least: ρ_Q (Eq. 11)."""
    delta = optimal_update(weights, fisher, group)
    return float(0.5 * delta @ fisher @ delta)
