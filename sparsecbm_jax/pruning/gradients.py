"""Gradients of a concept's loss by its subnetwork's kernels."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.backbones import input_products
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.trees import Params, with_leaf
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.losses import subnetwork_loss

Kernels = Mapping[str, Float[Array, "..."]]
ConceptMask = Mapping[str, Bool[Array, "..."]]


class Subnetwork(NamedTuple):
    """One concept's subnetwork, with the heads that its loss L_k is read through.

    Attributes:
        config: the model.
        params: the backbone θ that all concepts share.
        mask: M_k, {path: booleans}; all True is the whole backbone.
        heads: projector and label predictor.
        concept: k.
    """

    config: CBMConfig
    params: Params
    mask: ConceptMask
    heads: Heads
    concept: int

    @property
    def kernels(self) -> dict[str, Float[Array, "..."]]:
        """θ_k on the maskable kernels, {path: where(M_k, θ, 0)}."""
        return masks_lib.kernels_of(self.params, self.mask)


@functools.partial(jax.jit, static_argnums=0)
def subnetwork_gradient(
    config: CBMConfig,
    params: Params,
    mask: ConceptMask,
    heads: Heads,
    batch: Batch,
    concept: Int[Array, ""],
    activations: Float[Array, "B K C"],
) -> dict[str, Float[Array, "..."]]:
    """Computes ∇L_k at θ_k of every maskable kernel, averaged over a minibatch; zero at pruned positions.

    Args:
        config: the model.
        params: the backbone θ.
        mask: one concept's mask; all True gives the gradient at θ.
        heads: projector and label predictor.
        batch: the minibatch, with labels.
        concept: k, traced, so that all concepts share a program.
        activations: σ(u) of all concepts for this batch.
    """
    kernels = masks_lib.kernels_of(params, mask)
    grads = jax.grad(lambda effective: subnetwork_loss(config, params, heads, batch, effective, concept, activations))(
        kernels
    )
    return {path: jnp.where(mask[path], grad, 0) for path, grad in grads.items()}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _input_products(
    config: CBMConfig, params: Params, mask: ConceptMask, batch: Batch, block_size: int
) -> dict[str, Float[Array, "*layers I b b"]]:
    own = dict(params)
    for path, kernel in masks_lib.kernels_of(params, mask).items():
        own = with_leaf(own, path, kernel)
    return input_products(config.backbone, own, batch.input_ids, batch.attention_mask, block_size=block_size)


class SubnetworkGradients:
    """Iterates over ∇L_k of each minibatch, or of each of its rows; may be iterated over more than once.

    Every pass computes the gradients again, so that what does not fit in memory at once can be done in several passes.

    Args:
        subnetwork: the subnetwork of concept k.
        batches: pairs of a batch and σ(u) of all concepts for it.
        per_example: whether gradients are those of single rows, the empirical Fisher as Eq. 7 writes it; padding rows
            are left out.
        limit: the most gradients of a pass.
        on_gradient: called after each.

    Attributes:
        concept: k.
    """

    def __init__(
        self,
        subnetwork: Subnetwork,
        batches: Sequence[tuple[Batch, Float[Array, "B K C"]]],
        *,
        per_example: bool = False,
        limit: int | None = None,
        on_gradient: Callable[[], object] = lambda: None,
    ) -> None:
        config, params, mask, heads, self.concept = subnetwork
        self._batches, self._per_example, self._limit = batches, per_example, limit
        self._on_gradient = on_gradient
        self._gradient = functools.partial(subnetwork_gradient, config, params, mask, heads)
        self._input_products = functools.partial(_input_products, config, params, mask)

    def __iter__(self) -> Iterator[Kernels]:
        for gradient in itertools.islice(self._all(), self._limit):
            yield sharding.in_turn(gradient)
            self._on_gradient()

    def input_norms(self) -> dict[str, Float[Array, "*layers inputs"]]:
        """Computes ‖x_i‖₂ of every input of every kernel of the subnetwork, over the real tokens of all batches."""
        return {path: jnp.sqrt(leaf[..., 0, 0]) for path, leaf in self.input_products(1).items()}

    def input_products(self, block_size: int) -> dict[str, Float[Array, "*layers I b b"]]:
        """Computes Σ x xᵀ of every block of inputs of every kernel of the subnetwork, over all real tokens."""
        total: dict[str, Array] = {}
        for batch, _ in self._batches:
            products = sharding.in_turn(self._input_products(batch, block_size))
            total = {path: total[path] + leaf if total else leaf for path, leaf in products.items()}
            self._on_gradient()
        return total

    def _all(self) -> Iterator[Kernels]:
        k = jnp.asarray(self.concept)
        for batch, activations in self._batches:
            if not self._per_example:
                yield self._gradient(batch, k, activations)
                continue
            for row in range(batch.input_ids.shape[0]):
                if batch.example_weight[row] > 0:
                    one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)
                    yield self._gradient(one, k, activations[row : row + 1])
