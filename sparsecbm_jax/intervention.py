"""A person's correction of one concept becomes a small, visible, reversible change of that concept's mask.

θ, ψ and φ stay frozen. The gradient of the corrected concept's loss, taken at all positions of the subnetwork, pruned
ones too, ranks the weights; equally many are dropped and grown, so the sparsity does not change by a single weight.

Reference: Tan et al. 2024, 'Sparsity-based Inference-time intervention'.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from sparsecbm_jax import cbm
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.cbm import CBMConfig, CBMOutput
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.edits import MaskEdit, is_traced
from sparsecbm_jax.masks import AnyMasks, Params
from sparsecbm_jax.selection import count_true

# Added to the products of a guard's directions with themselves, as a share of their mean square.
_RIDGE = 1e-4
# What a step drops, and what it grows, is counted in one unsigned integer.
_MOST_CHANGED = 2**32 - 1

SaliencyFn = Callable[[Any, Any], Any]
"""(weights, gradient of the loss by the effective weights) -> score; the lowest are dropped, the highest grown."""


def signed(weight: Float[Array, "..."], grad: Float[Array, "..."]) -> Float[Array, "..."]:
    """First-order fall of the loss when a weight is grown, −G with G = ∂L/∂M = ∂L/∂θ_k ⊙ θ.

    Growing weight i changes the loss by about +G_i and dropping it by −G_i, so the score orders both: the kept weights
    with the lowest −G do the most harm, the pruned ones with the highest −G would help most.

    Deviation: the paper ranks by magnitude; the sign needs far fewer weights for the same correction.
    """
    return -grad * weight


class Guard(NamedTuple):
    """What an edit of one concept's mask costs everything else that the concept is read from.

    Attributes:
        costs: {path: positive numbers}, squared and to be compared within a concept, such as a Fisher diagonal by the
            effective weights. Gains are divided by their root.
        directions: {path: [P, ...]}, gradients by the effective weights of P quantities that an edit is to leave where
            they are, to first order; None for none.
    """

    costs: Mapping[str, Float[Array, "..."]]
    directions: Mapping[str, Float[Array, "P ..."]] | None = None


def guarded(weight: Float[Array, "..."], grad: Float[Array, "..."], cost: Float[Array, "..."]) -> Float[Array, "..."]:
    """The signed fall of the loss over the root of what a change costs everything else, −G / (|θ| √cost).

    Flipping a weight moves it by |θ|, which costs |θ|² · cost / 2 to second order: the weight's size cancels.
    """
    return -grad * jnp.sign(weight) / jnp.sqrt(cost)


def spare(grads: Mapping[str, Float[Array, "..."]], guard: Guard) -> dict[str, Float[Array, "..."]]:
    r"""The gradient without what would move the guarded quantities.

    $g - \sum_p \lambda_p h_p$ with λ such that the step that follows it, weight by weight over its cost, is orthogonal
    to every direction h_p. Costs of single changes add up as squares only where their effects do not agree; along
    these directions they do.

    Reference: after A-GEM (Chaudhry et al. 2019), which projects by one direction and without costs.
    """
    if guard.directions is None:
        return dict(grads)
    products, against = jnp.float32(0), jnp.float32(0)
    for path, own in guard.directions.items():
        axes = tuple(range(1, own.ndim))
        weighted = own / guard.costs[path]
        with jax.default_matmul_precision("highest"):
            products += jnp.tensordot(weighted, own, axes=(axes, axes))
            against += jnp.tensordot(weighted, grads[path], axes=(axes, tuple(range(grads[path].ndim))))
    # Directions may depend on each other; those of a class that no text has are zero.
    ridge = _RIDGE * jnp.trace(products) / products.shape[0] + jnp.finfo(products.dtype).tiny
    amounts = jnp.linalg.solve(products + ridge * jnp.eye(products.shape[0]), against)
    return {path: grad - jnp.tensordot(amounts, guard.directions[path], axes=1) for path, grad in grads.items()}


def magnitude(weight: Float[Array, "..."], grad: Float[Array, "..."]) -> Float[Array, "..."]:
    """The saliency as the paper prints it, S = |G ⊙ θ| with the mask's gradient G = ∂L/∂M = ∂L/∂θ_k ⊙ θ.

    Read to the letter, θ enters twice: once through the gradient of the mask, once as the printed factor.

    Reference: Tan et al. 2024, 'Sparsity-based Inference-time intervention', S = ||G_k(x) · θ*||.
    """
    return jnp.abs(grad * weight * weight)


SALIENCIES: Mapping[str, SaliencyFn] = {"signed": signed, "magnitude": magnitude}


class OracleOutput(NamedTuple):
    """Activations with one concept set by hand, and the label that follows from them."""

    activations: Float[Array, "B K C"]
    label_logits: Float[Array, "B Y"]


def intervene(
    config: CBMConfig,
    params: Params,
    masks: AnyMasks,
    heads: Params,
    batch: Batch,
    concept: int | Int[Array, ""],
    target: int | Int[Array, ""] | Int[Array, " B"],
    drop_fraction: float | Float[Array, ""],
    label: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    *,
    saliency: str | SaliencyFn = "signed",
    num_steps: int | Int[Array, ""] = 1,
    scope: str = "global",
    guard: Guard | None = None,
) -> tuple[AnyMasks, MaskEdit]:
    r"""Moves concept k's mask so that it reads the batch as class `target`.

    $L_k = \gamma\,CE(u_k, target) + CE(y, label)$, averaged over the batch, is differentiated by the effective kernels
    of subnetwork k alone, the other concepts' activations held constant; without a label the second term is left out.
    Each step drops the n kept weights of lowest score and grows the n pruned ones of highest score. Pure, and compiled
    once for all concepts, targets, fractions, labels and numbers of steps of a batch shape.

    Args:
        config: the model's static description.
        params: the backbone θ.
        masks: of all K concepts, booleans or packed: a byte a weight instead of K for K of 8 or less.
        heads: projector ψ and predictor φ.
        batch: the texts to be corrected together, usually one row. Their own labels are not read.
        concept: index k of the corrected concept.
        target: class the concept should have, for all rows or for each.
        drop_fraction: r in [0, 1]; each step drops and grows n = r · (maskable weights of the backbone) weights,
            rounded in float64 to the nearest integer, halves to even. A traced fraction is rounded in its own precision
            and cut to what the mask can give, since nothing can be refused then.
        label: task label to pull towards as well, for all rows or for each; None or −1 for none.
        saliency: 'signed', 'magnitude', 'guarded', or a function of one's own (see `SaliencyFn`).
        num_steps: how often to differentiate and edit, at least 1.
        scope: what weights compete with: all of the backbone ('global'), or those of their kernel and layer
            ('per_kernel'), each of which then drops and grows its own share r, rounded by itself.
        guard: for saliency 'guarded', what a change costs everything else; see `Guard`.

    Returns:
        The new masks, packed if they were, which differ in concept k only and keep exactly as many weights, and the
        edit: the difference between first and last mask over all steps.

    Raises:
        ValueError: if concept, target, label or drop_fraction lies out of range, the subnetwork has fewer kept or
            pruned weights than the fraction asks for, the masks are missing, or saliency 'guarded' and a guard do not
            go together.

    Reference: Tan et al. 2024, 'Sparsity-based Inference-time intervention'.
    """
    if (saliency == "guarded") != (guard is not None):
        raise ValueError(f"saliency is {saliency!r}, but guard is {'' if guard is None else 'not '}None; expected both")
    saliency_fn = None if guard is not None else find_saliency(saliency)
    check_masks(masks)
    if not is_traced(num_steps) and num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1")
    label = -1 if label is None else label
    check_index("concept", concept, 0, config.num_concepts)
    check_index("target", target, 0, config.num_classes)
    check_index("label", label, -1, config.num_labels)
    num_rows = batch.input_ids.shape[0]
    return _intervene(
        config,
        params,
        masks,
        heads,
        batch,
        jnp.asarray(concept, jnp.int32),
        jnp.broadcast_to(jnp.asarray(target, jnp.int32), (num_rows,)),
        _change_count(masks, concept, drop_fraction, scope),
        jnp.broadcast_to(jnp.asarray(label, jnp.int32), (num_rows,)),
        jnp.asarray(num_steps, jnp.int32),
        guard,
        saliency_fn=saliency_fn,
    )


@functools.partial(jax.jit, static_argnames=("config", "saliency_fn"))
def _intervene(
    config: CBMConfig,
    params: Params,
    masks: AnyMasks,
    heads: Params,
    batch: Batch,
    concept: Int[Array, ""],
    target: Int[Array, " B"],
    count: UInt[Array, ""] | Mapping[str, UInt[Array, "*layers"]],
    label: Int[Array, " B"],
    num_steps: Int[Array, ""],
    guard: Guard | None,
    *,
    saliency_fn: SaliencyFn | None,
) -> tuple[AnyMasks, MaskEdit]:
    before = cbm.forward(config, params, masks, heads, batch)
    weights = {path: masks_lib.leaf_at(params, path) for path in masks}
    wanted = jnp.broadcast_to(target[:, None], (target.shape[0], config.num_concepts))
    corrected = batch._replace(concepts=wanted, label=label)  # type: ignore[arg-type]

    def step(_: Int[Array, ""], mask: dict[str, Bool[Array, "..."]]) -> dict[str, Bool[Array, "..."]]:
        grads = jax.grad(cbm.subnetwork_loss, argnums=4)(
            config, params, heads, corrected, masks_lib.kernels_of(params, mask), concept, before.activations
        )
        if saliency_fn is None:
            assert guard is not None
            grads = spare(grads, guard)
            scores = {path: guarded(weights[path], grads[path], guard.costs[path]) for path in mask}
        else:
            scores = {path: saliency_fn(weights[path], grads[path]) for path in mask}
        return masks_lib.drop_and_grow(mask, scores, scores, count).mask

    old = masks_lib.concept(masks, concept)
    new = jax.lax.fori_loop(0, num_steps, step, old)
    after = cbm.subnetwork_output(
        config, params, heads, batch, masks_lib.kernels_of(params, new), concept, before.activations
    )
    edit = edit_between(old, new, before, after, concept=concept, target=target, label=label, num_per_step=_sum(count))
    return masks_lib.replace_concept(masks, concept, new), edit


def edit_between(
    old: Mapping[str, Bool[Array, "..."]],
    new: Mapping[str, Bool[Array, "..."]],
    before: CBMOutput,
    after: CBMOutput,
    *,
    concept: Int[Array, ""],
    target: Int[Array, " B"],
    label: Int[Array, " B"],
    num_per_step: Int[Array, ""] | UInt[Array, ""],
) -> MaskEdit:
    """The difference between two masks of a concept, with the model's output before and the subnetwork's after."""
    return MaskEdit(
        concept=concept,
        target=target,
        label=label,
        num_per_step=num_per_step.astype(jnp.uint32),
        dropped={path: old[path] & ~new[path] for path in old},
        grown={path: new[path] & ~old[path] for path in old},
        concept_logits_before=before.concept_logits,
        concept_logits_after=before.concept_logits.at[:, concept].set(after.concept_logits[:, 0]),
        label_logits_before=before.label_logits,
        label_logits_after=after.label_logits,
    )


@functools.partial(jax.jit, static_argnums=0)
def edit_of(
    config: CBMConfig,
    params: Params,
    old: AnyMasks,
    new: AnyMasks,
    heads: Params,
    batch: Batch,
    concept: int | Int[Array, ""],
    target: int | Int[Array, ""],
) -> MaskEdit:
    """The edit that leads from some masks to others, all but concept k's the same, and what it does to a batch."""
    before = cbm.forward(config, params, old, heads, batch)
    mask, new_mask = masks_lib.concept(old, concept), masks_lib.concept(new, concept)
    kernels = masks_lib.kernels_of(params, new_mask)
    after = cbm.subnetwork_output(config, params, heads, batch, kernels, concept, before.activations)
    rows = jnp.shape(batch.input_ids)[:1]
    return edit_between(
        mask,
        new_mask,
        before,
        after,
        concept=jnp.asarray(concept, jnp.int32),
        target=jnp.full(rows, target, jnp.int32),
        label=jnp.full(rows, -1, jnp.int32),
        num_per_step=_sum({path: mask[path] & ~new_mask[path] for path in mask}),
    )


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
    return OracleOutput(corrected, cbm.predict_label(heads, corrected))


def find_saliency(saliency: str | SaliencyFn) -> SaliencyFn:
    """The saliency of a name, or the function itself.

    Raises:
        ValueError: if there is none of that name.
    """
    if callable(saliency):
        return saliency
    if saliency not in SALIENCIES:
        raise ValueError(f"saliency is {saliency!r}; expected one of {', '.join(map(repr, SALIENCIES))} or a function")
    return SALIENCIES[saliency]


def check_masks(masks: AnyMasks | None) -> None:
    """Raises ValueError where there are no masks, or neither booleans nor their bits."""
    if not masks:
        raise ValueError(
            "the model has no masks: a dense model has nothing to drop or grow, train with strategy 'sparse'"
        )
    for path, mask in masks.items():
        if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.unsignedinteger):
            raise ValueError(f"{path}: the masks are {mask.dtype}; expected booleans, or their bits, see masks.pack")


def check_index(name: str, value: Any, low: int, high: int) -> None:
    """Raises ValueError where a concrete index is not in [low, high)."""
    if is_traced(value):
        return
    if np.any(np.asarray(value) < low) or np.any(np.asarray(value) >= high):
        raise ValueError(f"{name} is {value}; expected an integer in [{low}, {high - 1}]")


def _sum(count: UInt[Array, ""] | Mapping[str, UInt[Array, "*layers"] | Bool[Array, "..."]]) -> UInt[Array, ""]:
    return sum((jnp.sum(part, dtype=jnp.uint32) for part in jax.tree.leaves(count)), jnp.uint32(0))


def _change_count(
    masks: AnyMasks, concept: int | Int[Array, ""], drop_fraction: float | Float[Array, ""], scope: str
) -> UInt[Array, ""] | dict[str, UInt[Array, "*layers"]]:
    """How many weights a step drops and grows, of the whole backbone or of each kernel."""
    if scope not in ("global", "per_kernel"):
        raise ValueError(f"scope is {scope!r}; expected 'global' or 'per_kernel'")
    mask = masks_lib.concept(masks, concept)
    if is_traced(drop_fraction, concept, masks):
        if scope == "global":
            if masks_lib.num_weights(masks) > _MOST_CHANGED:
                raise ValueError(
                    f"a backbone of {masks_lib.num_weights(masks)} weights wants a drop_fraction that is no tracer"
                )
            return _traced_count(drop_fraction, _sum(mask), masks_lib.num_weights(masks))
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
    """Kept weights of each kernel that a leaf holds, one for every layer that it stacks, and the size of one."""
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
