"""Random parameters, heads and masks of any model, drawn by numpy: nothing to compile."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsecbm_jax.backbones import BackboneConfig, init_params, maskable_paths
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.heads import init_heads


def random_params(config: BackboneConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters as `init_params` has them: kernels and embeddings of deviation 0.02, scales one, biases zero."""
    shapes = _shapes_of_params(config)
    rng = np.random.default_rng([seed, 0])

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.asarray(np.full(leaf.shape, float(name == "scale"), np.float32))
        return jnp.asarray(rng.normal(scale=0.02, size=leaf.shape).astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_heads(config: CBMConfig, seed: int = 0, strategy: str = "sparse") -> dict[str, Any]:
    """Heads as `init_heads` has them: kernels of deviation 1/√fan_in, biases zero."""
    rng = np.random.default_rng([seed, 1])

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "bias":
            return jnp.asarray(np.zeros(leaf.shape, np.float32))
        is_projector = path[0].key == "projector"
        fan_in = leaf.shape[1] if is_projector else np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.normal(scale=fan_in**-0.5, size=leaf.shape).astype(np.float32))

    init = functools.partial(init_heads, config=config, has_bottleneck=strategy != "standard")
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_masks(config: CBMConfig, density: float, seed: int = 0) -> dict[str, jax.Array]:
    """K masks that keep about `density` of every maskable kernel."""
    rng, shapes = np.random.default_rng([seed, 2]), _shapes_of_params(config.backbone)
    return {
        path: jnp.asarray(rng.random((config.num_concepts, *leaf_at(shapes, path).shape)) < density)
        for path in maskable_paths(config.backbone)
    }


@functools.cache
def _shapes_of_params(config: BackboneConfig) -> Any:
    return jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
