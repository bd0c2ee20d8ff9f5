"""Baselines of mask edits: random edits, gradient steps, wrong labels, activations set by hand."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.trees import Params
from sparsecbm_jax.intervention.editors import Editor
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, MaskEdit, check_index, checked, edit_of
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.encode import encode
from sparsecbm_jax.model.heads import activate, predict_label, project
from sparsecbm_jax.model.losses import least_margin
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.model.subnetwork_weights import SubnetworkWeights


def random_share(drop_fraction: float, seed: int = 0) -> Editor:
    """Returns an editor that drops and grows random weights, to show the effect of their number alone.

    Args:
        drop_fraction: Share of the maskable weights that are dropped, and as many grown, in [0, 1].
        seed: Seed of the draw.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 2**16))

    def edit_at_random(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> ModelArrays:
        masks, concept = arrays.concept_masks, correction.concept
        count = round(drop_fraction * masks_lib.num_weights(masks))
        mask = _random_edit(masks_lib.concept(masks, concept), jnp.uint32(count), next(keys))
        return arrays._replace(masks=masks_lib.replace_concept(masks, concept, mask))

    return _editor(edit_at_random)


def projector_sgd(learning_rate: float, max_steps: int = 100) -> Editor:
    """Returns an editor that trains the concept's projector ψ_k and β_k alone, until the text has its target.

    Args:
        learning_rate: Size of a gradient step, above 0.
        max_steps: Most steps.
    """

    def train_projector(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> ModelArrays:
        return arrays._replace(heads=_projector_sgd(config, arrays, correction, learning_rate, max_steps))

    return _editor(train_projector)


def fine_tune(learning_rate: float, max_steps: int = 100) -> Editor:
    """Returns an editor that trains the backbone through the concept's subnetwork, until the text has its target.

    Args:
        learning_rate: Size of a gradient step, above 0.
        max_steps: Most steps.
    """

    def train_backbone(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> ModelArrays:
        return arrays._replace(params=_fine_tune(config, arrays, correction, learning_rate, max_steps))

    return _editor(train_backbone)


def _editor(change: Callable[[CBMConfig, ModelArrays, ConceptCorrection], ModelArrays]) -> Editor:
    """Returns the editor, of the same name, whose new model is that of a function."""

    @functools.wraps(change)
    def edit(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> tuple[ModelArrays, MaskEdit]:
        new = change(config, arrays, checked(config, arrays, correction))
        return new, edit_of(config, arrays, new, correction)

    return edit


def wrong_label(editor: Editor) -> Editor:
    """Returns an editor that gives `editor` the next class instead of the correct one, as a person may by mistake."""

    def correct_wrongly(
        config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection
    ) -> tuple[ModelArrays, MaskEdit]:
        return editor(config, arrays, correction._replace(target=(correction.target + 1) % config.num_classes))

    return correct_wrongly


def no_correction(
    config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection
) -> tuple[ModelArrays, MaskEdit]:
    """Leaves the model as it is."""
    return arrays, edit_of(config, arrays, arrays, correction)


@dataclasses.dataclass(frozen=True, eq=False)
class Oracle:
    """Sets the concept's activations by hand, which counts as repaired, and leaves the model as it is.

    Reference: Koh et al. 2020, 'Concept Bottleneck Models', test-time intervention.

    Attributes:
        class_activations: What a concept that is set to a class is given; see `SparseCBM.class_activations`.
    """

    class_activations: Float[np.ndarray, "K C C"]

    def __call__(
        self, config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection
    ) -> tuple[ModelArrays, MaskEdit]:
        """Returns the model as it is, and the edit, whose label follows from the activations."""
        edit = edit_of(config, arrays, arrays, correction)
        logits, k = edit.concept_logits_before, correction.concept
        asked = jax.nn.one_hot(edit.target, logits.shape[-1], dtype=logits.dtype)
        values = jnp.asarray(self.class_activations, logits.dtype)[k, edit.target]
        label = oracle_activations(arrays.heads, activate(config, logits), k, values).label_logits
        return arrays, edit._replace(concept_logits_after=logits.at[:, k].set(asked), label_logits_after=label)


def _kernels(arrays: ModelArrays, concept: int | Int[Array, ""]) -> dict[str, Float[Array, "1 ..."]]:
    mask = masks_lib.concept(arrays.concept_masks, concept)
    return {path: kernel[None] for path, kernel in masks_lib.kernels_of(arrays.params, mask).items()}


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
    """Takes plain gradient steps while the least margin is not above zero."""

    def step(carry: tuple[Params, Array, Array]) -> tuple[Params, Array, Array]:
        tree, _, number = carry
        grads = jax.grad(lambda leaves: loss_and_margin(leaves)[0])(tree)
        tree = jax.tree.map(lambda leaf, grad: leaf - learning_rate * grad, tree, grads)
        return tree, loss_and_margin(tree)[1], number + 1

    def goes_on(carry: tuple[Params, Array, Array]) -> Array:
        return (carry[1] <= 0) & (carry[2] < max_steps)

    return jax.lax.while_loop(goes_on, step, (start, loss_and_margin(start)[1], jnp.int32(0)))[0]


def _entropy_and_margin(logits: Float[Array, "B C"], correction: ConceptCorrection) -> tuple[Array, Array]:
    target, weights = jnp.asarray(correction.target), jnp.asarray(correction.batch.example_weight)
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)[:, 0]
    return jnp.sum(weights * entropy) / jnp.sum(weights), least_margin(logits, target, weights)


@functools.partial(jax.jit, static_argnums=0)
def _projector_sgd(
    config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection, rate: Array, max_steps: Array
) -> Heads:
    concept = correction.concept
    weights = SubnetworkWeights(arrays.params, kernels=_kernels(arrays, concept))
    z = encode(config, weights, correction.batch)

    def loss_and_margin(projector: Params) -> tuple[Array, Array]:
        return _entropy_and_margin(_project({"projector": projector}, z, concept), correction)

    # Rows of the other concepts get no gradient.
    trained = _descend(loss_and_margin, dict(arrays.heads["projector"]), rate, max_steps)
    return {**arrays.heads, "projector": trained}


@functools.partial(jax.jit, static_argnums=0)
def _fine_tune(
    config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection, rate: Array, max_steps: Array
) -> Params:
    concept = correction.concept

    def loss_and_margin(params: Params) -> tuple[Array, Array]:
        kernels = _kernels(arrays._replace(params=params), concept)
        z = encode(config, SubnetworkWeights(params, kernels=kernels), correction.batch)
        return _entropy_and_margin(_project(arrays.heads, z, concept), correction)

    return _descend(loss_and_margin, arrays.params, rate, max_steps)


class OracleOutput(NamedTuple):
    """Activations with one concept set by hand, and the label that follows from them."""

    activations: Float[Array, "B K C"]
    label_logits: Float[Array, "B Y"]


def oracle_activations(
    heads: Params,
    activations: Float[Array, "B K C"],
    concept: int | Int[Array, ""],
    values: Float[Any, " C"] | Float[Any, "B C"],
) -> OracleOutput:
    """Sets â_k to given values and predicts the label from them, without changing the model.

    The model therefore repeats its mistake on the next text; `intervene` is compared with this.

    Args:
        heads: Heads of the model.
        activations: Activations of the batch.
        concept: Index k of the concept.
        values: Activations of the concept, for all rows or for each.

    Reference: Koh et al. 2020, 'Concept Bottleneck Models', test-time intervention.
    """
    check_index("concept", concept, 0, activations.shape[1])
    corrected = jnp.asarray(activations).at[:, concept].set(jnp.asarray(values, activations.dtype))
    return OracleOutput(corrected, predict_label(heads, corrected))
