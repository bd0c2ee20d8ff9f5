"""An independent BERT concept-bottleneck model in NumPy, float64 or complex128: the oracle of gradients.

Differentiation is by complex step, Im f(x + ih) / h, which is exact to rounding and needs no backward pass.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import erf

COMPLEX_STEP = 1e-30


def as_float64(tree: Any) -> Any:
    """A nested dict of arrays as NumPy float64."""
    if isinstance(tree, dict):
        return {name: as_float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def leaf_at(tree: Any, path: str) -> np.ndarray:
    """The leaf at a '/'-joined path."""
    for part in path.split("/"):
        tree = tree[part]
    return tree


def complex_gradient(function: Callable[[np.ndarray], np.ndarray], point: np.ndarray) -> np.ndarray:
    """Gradient of a real scalar function of one array, element by element."""
    gradient = np.zeros(point.shape)
    for index in np.ndindex(point.shape):
        shifted = point.astype(np.complex128)
        shifted[index] += 1j * COMPLEX_STEP
        gradient[index] = function(shifted).imag / COMPLEX_STEP
    return gradient


def pooled(config: Any, params: Any, kernels: dict[str, np.ndarray], words: np.ndarray) -> np.ndarray:
    """z [D] of one unpadded text with word embeddings [T, D], through the given kernels ({path: [L, ...]})."""

    def norm(x: np.ndarray, p: Any) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + config.layer_norm_eps) * p["scale"] + p["bias"]

    def softmax(x: np.ndarray) -> np.ndarray:
        exponential = np.exp(x - x.real.max(-1, keepdims=True))
        return exponential / exponential.sum(-1, keepdims=True)

    def linear(x: np.ndarray, name: str, layer: int) -> np.ndarray:
        return x @ kernels[f"layers/{name}/kernel"][layer] + leaf_at(params, f"layers/{name}/bias")[layer]

    length, heads = len(words), config.num_heads
    embed = params["embed"]
    h = norm(words + embed["position"]["embedding"][:length] + embed["token_type"]["embedding"][0], embed["norm"])
    for layer in range(config.num_layers):
        query, key, value = (
            linear(h, f"attention/{name}", layer).reshape(length, heads, -1).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        probabilities = softmax(query @ key.swapaxes(1, 2) / np.sqrt(config.hidden_size // heads))
        mixed = linear((probabilities @ value).swapaxes(0, 1).reshape(length, -1), "attention/output", layer)
        norms = {
            name: {part: params["layers"][name][part][layer] for part in ("scale", "bias")}
            for name in ("attention_norm", "ffn_norm")
        }
        h = norm(h + mixed, norms["attention_norm"])
        hidden = linear(h, "ffn_in", layer)
        hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
        h = norm(h + linear(hidden, "ffn_out", layer), norms["ffn_norm"])
    return h.mean(0)


def concept_logits(heads: Any, concept: int, z: np.ndarray) -> np.ndarray:
    """u_k [C] of one text."""
    return z @ heads["projector"]["kernel"][concept] + heads["projector"]["bias"][concept]


def activation(u: np.ndarray) -> np.ndarray:
    """(u - mean u) / 10 [C] of a concept's logits, of complex numbers too."""
    return (u - u.mean()) / 10


def cross_entropy(logits: np.ndarray, target: int) -> np.ndarray:
    """-log softmax(logits)[target]."""
    shifted = logits - logits.real.max()
    return np.log(np.exp(shifted).sum()) - shifted[target]


def label_logits(heads: Any, activations: np.ndarray) -> np.ndarray:
    """y [Y] from activations [K, C]."""
    return np.einsum("kc,kcy->y", activations, heads["predictor"]["kernel"]) + heads["predictor"]["bias"]
