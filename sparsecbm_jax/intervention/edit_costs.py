"""Costs of a change of each weight for texts that a concept already predicts correctly; see `ranking.EditCosts`.

The Fisher diagonal measures by how much a concept's loss over training texts rises where a weight of its subnetwork
moves. The pruner needs it for kept weights. An edit also grows pruned ones, so here the gradients of the loss *through
the masked subnetwork* are taken at all positions.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.trees import add_power
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.ranking import EditCosts
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import concept_output
from sparsecbm_jax.model.losses import concept_loss
from sparsecbm_jax.model.sparse_cbm import ModelArrays


def fisher_costs(
    config: CBMConfig,
    arrays: ModelArrays,
    batches: Sequence[Batch],
    concept: int,
    *,
    floor: float = 0.01,
    on_gradient: Callable[[], object] = lambda: None,
) -> EditCosts:
    """Computes the diagonal of a concept's Fisher at its subnetwork, plus a share of its mean.

    F = (1/m) Σ_i g_i² + floor · mean, with g_i the gradient of CE(u_k, c_k), averaged over minibatch i, by the
    effective kernels θ_k. The gradient at a pruned weight is that of growing it.

    Args:
        config: The model's static description.
        arrays: Parameters, masks and heads.
        batches: Training texts with their gold concepts, m minibatches; padding rows and missing cells do not count.
        concept: Index k of the concept.
        floor: Share of the mean that is added, at least 0, so that no weight has a cost of zero.
        on_gradient: Called after each minibatch.

    Returns:
        Costs without directions.

    Raises:
        ValueError: There are no batches, or the concept has no gradient in any of them.
    """
    mask = masks_lib.concept(arrays.concept_masks, concept)
    total = {path: jnp.zeros(kept.shape, jnp.float32) for path, kept in mask.items()}
    for batch in batches:
        total = add_power(total, _gradient(config, arrays, batch, jnp.int32(concept)), 2)
        # Otherwise programs of many batches would wait in memory, each with a gradient of the whole backbone.
        jax.block_until_ready(total)
        on_gradient()
    mean = float(_sum(total)) / sum(leaf.size for leaf in total.values())
    if not mean > 0:
        raise ValueError(
            f"concept {concept}: the squared gradients over {len(batches)} batches add up to {mean}; expected training "
            "batches in which the concept is labelled"
        )
    return EditCosts({path: (leaf + floor * mean) / len(batches) for path, leaf in total.items()})


def sharpen(costs: EditCosts) -> EditCosts:
    """Raises costs to the power 3/2: gains are divided by F^0.75 in place of its root.

    If the effects of single changes on other texts all had one sign, division by F^0.5 would give the least cost for a
    gain; if they were independent, division by F would. The power 0.75 lies between both.
    """
    return costs._replace(costs={path: cost**1.5 for path, cost in costs.costs.items()})


def logit_directions(
    config: CBMConfig,
    arrays: ModelArrays,
    batches: Sequence[Batch],
    concept: int,
    *,
    on_gradient: Callable[[], object] = lambda: None,
) -> dict[str, Float[Array, "P ..."]]:
    """Averages gradients of a concept's logits over training texts, by gold class: directions that edits project out.

    Args:
        config: As for `fisher_costs`.
        arrays: As for `fisher_costs`.
        batches: As for `fisher_costs`.
        concept: As for `fisher_costs`.
        on_gradient: Called after each minibatch, once for every gold class.

    Returns:
        {path: P gradients by the effective kernels}, P = C · C: each class's logit over the texts of each gold class.
        Those of a gold class that no text has are zero.
    """
    mask, found = masks_lib.concept(arrays.concept_masks, concept), list[dict[str, Float[Array, "P ..."]]]()
    for gold in range(config.num_classes):
        total = {path: jnp.zeros((config.num_classes, *kept.shape), jnp.float32) for path, kept in mask.items()}
        num_texts = 0.0
        for batch in batches:
            weights = (np.asarray(batch.concepts)[:, concept] == gold) * np.asarray(batch.example_weight, np.float32)
            if weights.any():
                total = _add_logits(config, total, arrays, batch, jnp.int32(concept), weights)
                num_texts += float(weights.sum())
                jax.block_until_ready(total)
            on_gradient()
        found.append({path: leaf / max(num_texts, 1.0) for path, leaf in total.items()})
    return {path: jnp.concatenate([of_class[path] for of_class in found]) for path in mask}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_logits(
    config: CBMConfig,
    total: dict[str, Float[Array, "C ..."]],
    arrays: ModelArrays,
    batch: Batch,
    concept: Int[Array, ""],
    weights: Float[Array, " B"],
) -> dict[str, Float[Array, "C ..."]]:
    def logits(kernels: Mapping[str, Float[Array, "..."]]) -> Float[Array, " C"]:
        output = concept_output(config, arrays.params, arrays.heads, batch, kernels, concept)
        return weights @ output.concept_logits[:, 0]

    _, pull_back = jax.vjp(logits, _kernels(arrays, concept))
    # One class after another: together they would take C times the memory.
    grads = jax.lax.map(lambda one: pull_back(one)[0], jnp.eye(config.num_classes))
    return {path: total[path] + grad for path, grad in grads.items()}


@functools.partial(jax.jit, static_argnums=0)
def _gradient(
    config: CBMConfig, arrays: ModelArrays, batch: Batch, concept: Int[Array, ""]
) -> dict[str, Float[Array, "..."]]:
    cells = jax.lax.dynamic_slice_in_dim(jnp.asarray(batch.concepts), concept, 1, axis=1)

    def loss(kernels: Mapping[str, Float[Array, "..."]]) -> Float[Array, ""]:
        output = concept_output(config, arrays.params, arrays.heads, batch, kernels, concept)
        return concept_loss(config, output, batch._replace(concepts=cells))[0]

    return jax.grad(loss)(_kernels(arrays, concept))


def _kernels(arrays: ModelArrays, concept: Int[Array, ""]) -> dict[str, Float[Array, "..."]]:
    return masks_lib.kernels_of(arrays.params, masks_lib.concept(arrays.concept_masks, concept))


@jax.jit
def _sum(tree: Mapping[str, Float[Array, "..."]]) -> Float[Array, ""]:
    return sum((jnp.sum(leaf) for leaf in tree.values()), jnp.float32(0))
