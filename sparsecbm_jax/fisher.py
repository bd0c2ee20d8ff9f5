"""Gradients of L_k through subnetwork k, and the Fisher blocks that they add up to.

One concept at a time: the Gram of a concept takes 4·b bytes a weight, so K of them together would not fit where one
does. Gradients stream through a small buffer and are never kept.

Reference: Tan et al. 2024, Eq. 7. Gradients are taken at θ_k, the subnetwork as it is when the event falls, in
inference mode; at pruned positions they are zero, which decouples the kept weights from the pruned ones.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax import woodfisher
from sparsecbm_jax.cbm import CBMConfig, Heads, subnetwork_loss
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.masks import Params

Kernels = Mapping[str, Float[Array, "..."]]
# Gradients buffered before one product: 16 take most of what batching the outer products gives, at 64 bytes a weight.
BUFFER = 16


class BlockFisher(NamedTuple):
    """Summed outer products of one concept's gradients.

    Attributes:
      grams: {path: Σ_i g_i g_iᵀ} in blocks of consecutive inputs of one output unit.
      num_grads: m, how many gradients were really added; it divides, not the number that was asked for.
    """

    grams: dict[str, Float[Array, "N b b"]]
    num_grads: int


@functools.partial(jax.jit, static_argnums=0)
def subnetwork_gradient(
    config: CBMConfig,
    params: Params,
    mask: Mapping[str, Bool[Array, "..."]],
    heads: Heads,
    batch: Batch,
    concept: Int[Array, ""],
    activations: Float[Array, "B K C"],
) -> dict[str, Float[Array, "..."]]:
    """∇L_k at θ_k of every maskable kernel, averaged over a minibatch; zero at pruned positions.

    Args:
      mask: one concept's mask {path: booleans}; all True gives the gradient at θ.
      concept: k, traced.
      activations: σ(u) of all concepts for this batch.
    """
    kernels = {path: jnp.where(kept, masks_lib.leaf_at(params, path), 0) for path, kept in mask.items()}
    grads = jax.grad(lambda effective: subnetwork_loss(config, params, heads, batch, effective, concept, activations))(
        kernels
    )
    return {path: jnp.where(mask[path], grad, 0) for path, grad in grads.items()}


class SubnetworkGradients:
    """∇L_k of each minibatch, or of each of its rows: a stream that may be gone through more than once.

    Every pass computes the gradients anew, so that what does not fit in memory at once can be done in several passes.
    """

    def __init__(
        self,
        config: CBMConfig,
        params: Params,
        mask: Mapping[str, Bool[Array, "..."]],
        heads: Heads,
        batches: Sequence[tuple[Batch, Float[Array, "B K C"]]],
        concept: int,
        *,
        per_example: bool = False,
        limit: int | None = None,
    ) -> None:
        """Args are those of `subnetwork_gradient`, and:

        batches: pairs of a batch and σ(u) of all concepts for it.
        concept: k.
        per_example: gradients of single rows, the empirical Fisher as Eq. 7 writes it; padding rows are left out.
        limit: the most gradients of a pass.
        """
        self.concept, self._batches, self._per_example, self._limit = concept, batches, per_example, limit
        self._gradient = functools.partial(subnetwork_gradient, config, params, mask, heads)

    def __iter__(self) -> Iterator[Kernels]:
        return itertools.islice(self._all(), self._limit)

    def _all(self) -> Iterator[Kernels]:
        k = jnp.asarray(self.concept)
        for batch, activations in self._batches:
            if not self._per_example:
                yield self._gradient(batch, k, activations)
                continue
            for row in range(batch.input_ids.shape[0]):
                if batch.example_weight[row] > 0:
                    one = Batch(*(leaf[row : row + 1] for leaf in batch))
                    yield self._gradient(one, k, activations[row : row + 1])


def stacked(gradients: list[Float[Array, "*batch inputs outputs"]], block_size: int) -> Float[Array, "N u b"]:
    """The blocks of several gradients of one kernel, a block's gradients side by side."""
    return jnp.stack([woodfisher.to_blocks(gradient, block_size) for gradient in gradients], axis=1)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _add(grams: dict[str, Array], buffer: list[Kernels], block_size: int) -> dict[str, Array]:
    return {
        path: total + woodfisher.gram(stacked([grad[path] for grad in buffer], block_size))
        for path, total in grams.items()
    }


def accumulate(stream: Iterable[Kernels], block_size: int) -> BlockFisher:
    """Adds up the outer products of a stream of gradients.

    Raises:
      ValueError: if the stream is empty.
    """
    grams: dict[str, Array] | None = None
    buffer: list[Kernels] = []
    num_grads = 0
    for gradient in stream:
        if grams is None:
            grams = {
                path: jnp.zeros((woodfisher.to_blocks(grad, block_size).shape[0], block_size, block_size), grad.dtype)
                for path, grad in gradient.items()
            }
        buffer.append(gradient)
        num_grads += 1
        if len(buffer) == BUFFER:
            grams, buffer = _add(grams, buffer, block_size), []
    if grams is None:
        raise ValueError("no gradients were given to estimate the Fisher from")
    return BlockFisher(_add(grams, buffer, block_size) if buffer else grams, num_grads)
