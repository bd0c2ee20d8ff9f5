"""Concept projector ψ and label predictor φ (Eq. 1 and 3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsecbm_jax.core.sharding import SINGLE, Axes
from sparsecbm_jax.model.config import CBMConfig, Heads

# Log-odds of a concept that is read surely are about ten, in nats: in this unit they are of the size of probabilities.
LOG_ODDS_UNIT = 10.0


def init_heads(rng: Array, config: CBMConfig, *, has_bottleneck: bool = True) -> dict[str, dict[str, Array]]:
    """Draws random heads: the projector ψ and predictor φ, or without a bottleneck a plain classifier.

    Kernels are normal with standard deviation 1/√fan_in, biases zero.
    """
    width, k, c, y = config.backbone.output_size, config.num_concepts, config.num_classes, config.num_labels
    projector_rng, predictor_rng = jax.random.split(rng)
    if not has_bottleneck:
        return {
            "classifier": {
                "kernel": jax.random.normal(projector_rng, (width, y)) / jnp.sqrt(width),
                "bias": jnp.zeros((y,)),
            }
        }
    return {
        "projector": {
            "kernel": jax.random.normal(projector_rng, (k, width, c)) / jnp.sqrt(width),
            "bias": jnp.zeros((k, c)),
        },
        "predictor": {"kernel": jax.random.normal(predictor_rng, (k, c, y)) / jnp.sqrt(k * c), "bias": jnp.zeros((y,))},
    }


def project(heads: Heads, z: Float[Array, "B P D"]) -> Float[Array, "B K C"]:
    """Projects u_k = z_k ψ_k + β_k; a dense model's single z serves every concept."""
    kernel, bias = heads["projector"]["kernel"], heads["projector"]["bias"]
    if z.shape[1] == 1:
        return jnp.einsum("bd,kdc->bkc", z[:, 0], kernel) + bias
    return jnp.einsum("bkd,kdc->bkc", z, kernel) + bias


def activate(config: CBMConfig, u: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Computes the activations of a concept that the label reads from its logits u.

    'log_odds': a = (u − mean_c u) / 10, the logarithms of the class probabilities against their mean; 'centred':
    a = σ(u − mean_c u), the class probabilities in other words; 'sigmoid', the paper's: a = σ(u).

    Deviation: the concept loss sees softmax(u), which the mean of u does not change, and σ(u) changes with it. So σ(u)
    carries a free number for each concept that no label constrains and no page shows, and that the label reads. And σ
    is flat where a concept is read surely, so that the label cannot tell 'good' from 'excellent' there.
    """
    if config.activation == "sigmoid":
        return jax.nn.sigmoid(u)
    centred = u - jnp.mean(u, axis=-1, keepdims=True)
    return jax.nn.sigmoid(centred) if config.activation == "centred" else centred / LOG_ODDS_UNIT


def predict_label(heads: Heads, activations: Float[Array, "B K C"], axes: Axes = SINGLE) -> Float[Array, "B Y"]:
    """Predicts y = φ_0 + Σ_k a_k φ_k (Eq. 3), summed over the `concept` axis where there is one."""
    total = jnp.einsum("bkc,kcy->by", activations, heads["predictor"]["kernel"])
    if axes.is_manual:
        total = jax.lax.psum(total, "concept")
    return total + heads["predictor"]["bias"]
