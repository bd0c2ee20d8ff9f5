"""What mask edits are compared with: random edits, gradient steps, wrong labels, activations set by hand."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.trees import Params
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.editors import Editor, Outcome, is_predicted_as
from sparsecbm_jax.intervention.mask_edit import check_index
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.encode import encode
from sparsecbm_jax.model.forward import concept_logits
from sparsecbm_jax.model.heads import predict_label, project
from sparsecbm_jax.model.losses import least_margin
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.model.subnetwork_weights import SubnetworkWeights


def random_share(drop_fraction: float, seed: int = 0) -> Editor:
    """Drops and grows weights by lot: what changing so many does by itself."""
    keys = iter(jax.random.split(jax.random.key(seed), 2**16))

    def correct(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
        count = round(drop_fraction * masks_lib.num_weights(state.masks))
        mask = _random_edit(masks_lib.concept(state.masks, concept), jnp.uint32(count), next(keys))
        new = state._replace(masks=masks_lib.replace_concept(state.masks, concept, mask))
        return Outcome(new, 2 * count, is_predicted_as(concept_logits(config, *new, batch, concept), target, batch))

    return correct


def projector_sgd(learning_rate: float, max_steps: int = 100) -> Editor:
    """Gradient steps on the concept's projector ψ_k and β_k alone, until the text is read as asked."""

    def correct(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
        heads = _projector_sgd(config, state, batch, concept, target, learning_rate, max_steps)
        new = state._replace(heads=heads)
        kernel = state.heads["projector"]["kernel"]
        changed = (kernel.shape[1] + 1) * kernel.shape[2]
        return Outcome(new, changed, is_predicted_as(concept_logits(config, *new, batch, concept), target, batch))

    return correct


def fine_tune(learning_rate: float, max_steps: int = 100) -> Editor:
    """Gradient steps on the whole backbone, through the concept's subnetwork, until the text is read as asked."""

    def correct(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
        params = _fine_tune(config, state, batch, concept, target, learning_rate, max_steps)
        new = state._replace(params=params)
        changed = sum(leaf.size for leaf in jax.tree.leaves(params))
        return Outcome(new, changed, is_predicted_as(concept_logits(config, *new, batch, concept), target, batch))

    return correct


def wrong_label(arm: Editor) -> Editor:
    """Another arm that is given the next class instead of the right one: a person's slip."""

    def correct(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
        return arm(config, state, batch, concept, (target + 1) % config.num_classes)

    return correct


def _kernels(state: ModelArrays, concept: int | Int[Array, ""]) -> dict[str, Float[Array, "1 ..."]]:
    mask = masks_lib.concept(state.masks, concept)
    return {path: kernel[None] for path, kernel in masks_lib.kernels_of(state.params, mask).items()}


def _project(heads: Heads, z: Float[Array, "B 1 D"], concept: int | Int[Array, ""]) -> Float[Array, "B C"]:
    own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, concept, 0), heads["projector"])
    return project({"projector": own}, z)[:, 0]


@jax.jit
def _random_edit(mask: dict[str, Array], count: Array, key: Array) -> dict[str, Array]:
    keys = jax.random.split(key, len(mask))
    scores = {path: jax.random.uniform(k, mask[path].shape) for k, path in zip(keys, sorted(mask), strict=True)}
    return masks_lib.drop_and_grow(mask, scores, scores, count).mask


def _descend(
    loss_and_margin: Callable[[Params], tuple[Array, Array]], start: Params, learning_rate: Array, max_steps: Array
) -> Params:
    """Plain gradient steps while the least margin is not above zero."""

    def step(carry: tuple[Params, Array, Array]) -> tuple[Params, Array, Array]:
        tree, _, number = carry
        grads = jax.grad(lambda leaves: loss_and_margin(leaves)[0])(tree)
        tree = jax.tree.map(lambda leaf, grad: leaf - learning_rate * grad, tree, grads)
        return tree, loss_and_margin(tree)[1], number + 1

    def goes_on(carry: tuple[Params, Array, Array]) -> Array:
        return (carry[1] <= 0) & (carry[2] < max_steps)

    return jax.lax.while_loop(goes_on, step, (start, loss_and_margin(start)[1], jnp.int32(0)))[0]


def _entropy_and_margin(logits: Float[Array, "B C"], target: Array, batch: Batch) -> tuple[Array, Array]:
    weights = jnp.asarray(batch.example_weight)
    entropy = -jax.nn.log_softmax(logits)[:, target]
    wanted = jnp.broadcast_to(target, logits.shape[:1])
    return jnp.sum(weights * entropy) / jnp.sum(weights), least_margin(logits, wanted, weights)


@functools.partial(jax.jit, static_argnums=0)
def _projector_sgd(
    config: CBMConfig, state: ModelArrays, batch: Batch, concept: Array, target: Array, rate: Array, max_steps: Array
) -> Heads:
    z = encode(config, SubnetworkWeights(state.params, kernels=_kernels(state, concept)), batch)

    def loss_and_margin(projector: Params) -> tuple[Array, Array]:
        return _entropy_and_margin(_project({"projector": projector}, z, concept), target, batch)

    # Rows of the other concepts get no gradient.
    trained = _descend(loss_and_margin, dict(state.heads["projector"]), rate, max_steps)
    return {**state.heads, "projector": trained}


@functools.partial(jax.jit, static_argnums=0)
def _fine_tune(
    config: CBMConfig, state: ModelArrays, batch: Batch, concept: Array, target: Array, rate: Array, max_steps: Array
) -> Params:
    def loss_and_margin(params: Params) -> tuple[Array, Array]:
        z = encode(config, SubnetworkWeights(params, kernels=_kernels(state._replace(params=params), concept)), batch)
        return _entropy_and_margin(_project(state.heads, z, concept), target, batch)

    return _descend(loss_and_margin, state.params, rate, max_steps)


class OracleOutput(NamedTuple):
    """Activations with one concept set by hand, and the label that follows from them."""

    activations: Float[Array, "B K C"]
    label_logits: Float[Array, "B Y"]


def oracle_activations(
    heads: Params,
    activations: Float[Array, "B K C"],
    concept: int | Int[Array, ""],
    target: int | Int[Array, ""] | Int[Array, " B"],
) -> OracleOutput:
    """Sets â_k to the one-hot vector of class `target` and reads the label off it; backbone and masks are untouched.

    The model repeats its mistake on the next text, which is what `intervene` is for; this is the comparison.

    Reference: Koh et al. 2020, 'Concept Bottleneck Models', test-time intervention.
    """
    check_index("concept", concept, 0, activations.shape[1])
    check_index("target", target, 0, activations.shape[2])
    hard = jax.nn.one_hot(jnp.asarray(target), activations.shape[2], dtype=activations.dtype)
    corrected = jnp.asarray(activations).at[:, concept].set(hard)
    return OracleOutput(corrected, predict_label(heads, corrected))
