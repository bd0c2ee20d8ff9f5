"""Edits of a given size: a correction of one concept as a small, visible, reversible change of that concept's mask.

θ, ψ and φ stay frozen. The gradient of the corrected concept's loss, taken at all positions of the subnetwork, also at
pruned ones, ranks the weights. Equally many are dropped and grown, so the number of kept weights does not change.

Reference: Tan et al. 2024, 'Sparsity-based Inference-time intervention'.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import AnyMasks
from sparsecbm_jax.core.selection import count_true
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.intervention.mask_edit import (
    ConceptCorrection,
    MaskEdit,
    checked,
    edit_between,
    is_traced,
    total,
)
from sparsecbm_jax.intervention.ranking import EditCosts, SaliencyFn, cost_aware, find_saliency, project_out
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import forward, subnetwork_output
from sparsecbm_jax.model.losses import subnetwork_loss
from sparsecbm_jax.model.sparse_cbm import ModelArrays

# The number of weights that a step drops is one unsigned integer.
_MOST_CHANGED = 2**32 - 1


def intervene(
    config: CBMConfig,
    arrays: ModelArrays,
    correction: ConceptCorrection,
    drop_fraction: float | Float[Array, ""],
    *,
    saliency: str | SaliencyFn | EditCosts = "signed",
    num_steps: int | Int[Array, ""] = 1,
    scope: str = "global",
) -> tuple[AnyMasks, MaskEdit]:
    """Changes concept k's mask towards the prediction of class `target` for the batch.

    L_k = γ CE(u_k, target) + CE(y, label), averaged over the batch, is differentiated by the effective kernels of
    subnetwork k alone, with the other concepts' activations constant; without a label there is no second term. Each
    step drops the n kept weights of lowest score and grows the n pruned ones of highest score. The function is pure,
    and compiled once for all concepts, targets, fractions, labels and numbers of steps of a batch shape.

    Args:
        config: The model's static description.
        arrays: Parameters, masks and heads; masks as booleans, or packed: for K up to 8, one byte a weight instead of
            K.
        correction: The texts, the concept and the class that it should have.
        drop_fraction: r in [0, 1]; each step drops and grows n = r · (maskable weights of the backbone) weights,
            rounded in float64 to the nearest integer, halves to even. A traced fraction is rounded in its own precision
            and limited to the mask's kept and pruned weights, since a traced value cannot raise an error.
        saliency: 'signed', 'magnitude', a function of one's own (see `SaliencyFn`), or the costs of a change for other
            texts, by which signed gains are divided (see `EditCosts`).
        num_steps: Number of steps, at least 1; each differentiates and edits.
        scope: Weights that compete with each other: all of the backbone ('global'), or those of one kernel and layer
            ('per_kernel'), each of which then drops and grows its own share r, rounded by itself.

    Returns:
        The new masks, packed if they were, which differ in concept k only and keep exactly as many weights, and the
        edit: the difference between first and last mask over all steps.

    Raises:
        ValueError: Concept, target, label, drop_fraction, num_steps or scope lies out of range, the subnetwork has
            fewer kept or pruned weights than the fraction needs, or the masks are missing.

    Reference: Tan et al. 2024, 'Sparsity-based Inference-time intervention'.
    """
    costs = saliency if isinstance(saliency, EditCosts) else None
    saliency_fn = None if isinstance(saliency, EditCosts) else find_saliency(saliency)
    correction = checked(config, arrays, correction)
    if not is_traced(num_steps) and num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1")
    count = _change_count(arrays.concept_masks, correction.concept, drop_fraction, scope)
    return _intervene(
        config, arrays, correction, count, jnp.asarray(num_steps, jnp.int32), costs, saliency_fn=saliency_fn
    )


@functools.partial(jax.jit, static_argnames=("config", "saliency_fn"))
def _intervene(
    config: CBMConfig,
    arrays: ModelArrays,
    correction: ConceptCorrection,
    count: UInt[Array, ""] | Mapping[str, UInt[Array, "*layers"]],
    num_steps: Int[Array, ""],
    costs: EditCosts | None,
    *,
    saliency_fn: SaliencyFn | None,
) -> tuple[AnyMasks, MaskEdit]:
    params, masks, heads = arrays.params, arrays.concept_masks, arrays.heads
    batch, concept, target = correction.batch, correction.concept, jnp.asarray(correction.target)
    before = forward(config, arrays, batch)
    weights = {path: leaf_at(params, path) for path in masks}
    targets = jnp.broadcast_to(target[:, None], (target.shape[0], config.num_concepts))
    corrected = batch._replace(concepts=targets, label=correction.label)  # type: ignore[arg-type]

    def step(_: Int[Array, ""], mask: dict[str, Bool[Array, "..."]]) -> dict[str, Bool[Array, "..."]]:
        grads = jax.grad(subnetwork_loss, argnums=4)(
            config, params, heads, corrected, masks_lib.kernels_of(params, mask), concept, before.activations
        )
        if saliency_fn is None:
            assert costs is not None
            grads = project_out(grads, costs)
            scores = {path: cost_aware(weights[path], grads[path], costs.costs[path]) for path in mask}
        else:
            scores = {path: saliency_fn(weights[path], grads[path]) for path in mask}
        return masks_lib.drop_and_grow(mask, scores, scores, count).mask

    old = masks_lib.concept(masks, concept)
    new = jax.lax.fori_loop(0, num_steps, step, old)
    after = subnetwork_output(
        config, params, heads, batch, masks_lib.kernels_of(params, new), concept, before.activations
    )
    edit = edit_between(old, new, before, after, correction, total(count))
    return masks_lib.replace_concept(masks, concept, new), edit


def _change_count(
    masks: AnyMasks, concept: int | Int[Array, ""], drop_fraction: float | Float[Array, ""], scope: str
) -> UInt[Array, ""] | dict[str, UInt[Array, "*layers"]]:
    """Computes the number of weights that a step drops and grows, of the whole backbone or of each kernel."""
    if scope not in ("global", "per_kernel"):
        raise ValueError(f"scope is {scope!r}; expected 'global' or 'per_kernel'")
    mask = masks_lib.concept(masks, concept)
    if is_traced(drop_fraction, concept, masks):
        if scope == "global":
            if masks_lib.num_weights(masks) > _MOST_CHANGED:
                raise ValueError(
                    f"a backbone of {masks_lib.num_weights(masks)} weights needs a drop_fraction that is no tracer"
                )
            return _traced_count(drop_fraction, total(mask), masks_lib.num_weights(masks))
        return {path: _traced_count(drop_fraction, *_kept_of_each(path, kept)) for path, kept in mask.items()}
    fraction = float(drop_fraction)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"drop_fraction is {fraction}; expected a share of the backbone in [0, 1]")
    if scope == "global":
        kept = np.asarray(count_true(mask))
        return _checked_count(fraction, kept, masks_lib.num_weights(masks), f"concept {int(concept)}")
    return {
        path: _checked_count(fraction, *_kept_of_each(path, kept), f"concept {int(concept)} in {path}")
        for path, kept in mask.items()
    }


def _kept_of_each(path: str, kept: Bool[Array, "..."]) -> tuple[UInt[Array, "*layers"], int]:
    """Counts the kept weights of each kernel of a leaf, one for every stacked layer; also returns a kernel's size."""
    first = 1 if path.startswith("layers/") else 0
    counts = jnp.sum(kept, axis=range(first, kept.ndim), dtype=jnp.uint32)
    return counts, kept.size // max(counts.size, 1)


def _traced_count(
    drop_fraction: float | Float[Array, ""], kept: UInt[Array, "*layers"], total: int
) -> UInt[Array, "*layers"]:
    asked = jnp.round(jnp.asarray(drop_fraction) * total).astype(jnp.uint32)
    return jnp.minimum(asked, jnp.minimum(kept, jnp.uint32(total) - kept))


def _checked_count(
    fraction: float, kept: UInt[Array, "*layers"] | np.ndarray, total: int, where: str
) -> UInt[Array, "*layers"]:
    count, num_kept = round(fraction * total), np.asarray(kept, np.int64)
    if count > _MOST_CHANGED:
        raise ValueError(
            f"drop_fraction {fraction:g} asks to drop {count} weights; expected at most {_MOST_CHANGED / total:g}"
        )
    for verb, kind, available in (
        ("drop", "kept", int(num_kept.min())),
        ("grow", "pruned", total - int(num_kept.max())),
    ):
        if count > available:
            raise ValueError(
                f"drop_fraction {fraction:g} asks to {verb} {count} weights, but the subnetwork of {where} has only "
                f"{available} {kind} ones of {total}; expected at most {available / total:g}"
            )
    return jnp.full(kept.shape, count, jnp.uint32)
