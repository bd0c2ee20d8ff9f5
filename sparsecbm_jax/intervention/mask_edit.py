"""An edit of one mask as arrays: applied, undone, counted."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import AnyMasks
from sparsecbm_jax.core.selection import count_true
from sparsecbm_jax.core.trees import Params
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig, CBMOutput
from sparsecbm_jax.model.forward import forward, subnetwork_output


class MaskEdit(NamedTuple):
    """What one intervention changed: data that `apply` and `undo` read, and the predictions on both sides of it.

    Attributes:
        concept: index of the one concept whose mask changed.
        target: class that each row's concept was to have.
        label: task label that entered the loss, −1 for none.
        num_per_step: weights dropped, and as many grown, in each step.
        dropped: per path, positions kept before and pruned now.
        grown: per path, positions pruned before and kept now.
        concept_logits_before, concept_logits_after: u of all concepts; only those of `concept` differ.
        label_logits_before, label_logits_after: y.
    """

    concept: Int[Array, ""]
    target: Int[Array, " B"]
    label: Int[Array, " B"]
    num_per_step: UInt[Array, ""]
    dropped: dict[str, Bool[Array, "..."]]
    grown: dict[str, Bool[Array, "..."]]
    concept_logits_before: Float[Array, "B K C"]
    concept_logits_after: Float[Array, "B K C"]
    label_logits_before: Float[Array, "B Y"]
    label_logits_after: Float[Array, "B Y"]


def apply(masks: AnyMasks, edit: MaskEdit) -> AnyMasks:
    """Masks with the edit made: what was dropped is pruned, what was grown is kept; to the bit.

    Raises:
        ValueError: if concrete masks do not keep every position to be dropped and prune every position to be grown.
    """
    return _flip(masks, edit.concept, off=edit.dropped, on=edit.grown, verb="apply")


def undo(masks: AnyMasks, edit: MaskEdit) -> AnyMasks:
    """The inverse of `apply`: `undo(apply(masks, edit), edit)` is `masks` to the bit.

    Raises:
        ValueError: if concrete masks no longer hold the edit, because another one changed the same positions since.
    """
    return _flip(masks, edit.concept, off=edit.grown, on=edit.dropped, verb="undo")


def num_changed(edit: MaskEdit) -> tuple[int, int]:
    """How many weights an edit dropped and grew, exact."""
    return count_true(edit.dropped), count_true(edit.grown)


def is_traced(*values: Any) -> bool:
    """Whether anything in some trees is a tracer, whose value cannot be looked at."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def _flip(masks: AnyMasks, concept: Int[Array, ""], *, off: Mapping, on: Mapping, verb: str) -> AnyMasks:
    mask = masks_lib.concept(masks, concept)
    for path in sorted({*mask, *off, *on}):
        shapes = [tree[path].shape if path in tree else None for tree in (mask, off, on)]
        if len(set(shapes)) != 1:
            raise ValueError(f"cannot {verb} the edit: {path} has mask shape {shapes[0]} but edit shape {shapes[1]}")
    if not is_traced(masks, concept, off, on):
        stale = sum(count_true({path: off[path] & ~mask[path], "on": on[path] & mask[path]}) for path in mask)
        if stale:
            raise ValueError(
                f"cannot {verb} the edit of concept {int(concept)}: {stale} of its positions are in another state; "
                f"expected masks {'as they were before it' if verb == 'apply' else 'that still hold it'}"
            )
    return masks_lib.replace_concept(masks, concept, {path: (mask[path] & ~off[path]) | on[path] for path in mask})


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
    before = forward(config, params, old, heads, batch)
    mask, new_mask = masks_lib.concept(old, concept), masks_lib.concept(new, concept)
    kernels = masks_lib.kernels_of(params, new_mask)
    after = subnetwork_output(config, params, heads, batch, kernels, concept, before.activations)
    rows = jnp.shape(batch.input_ids)[:1]
    return edit_between(
        mask,
        new_mask,
        before,
        after,
        concept=jnp.asarray(concept, jnp.int32),
        target=jnp.full(rows, target, jnp.int32),
        label=jnp.full(rows, -1, jnp.int32),
        num_per_step=total({path: mask[path] & ~new_mask[path] for path in mask}),
    )


def check_index(name: str, value: Any, low: int, high: int) -> None:
    """Raises ValueError where a concrete index is not in [low, high)."""
    if is_traced(value):
        return
    if np.any(np.asarray(value) < low) or np.any(np.asarray(value) >= high):
        raise ValueError(f"{name} is {value}; expected an integer in [{low}, {high - 1}]")


def total(count: UInt[Array, ""] | Mapping[str, UInt[Array, "*layers"] | Bool[Array, "..."]]) -> UInt[Array, ""]:
    return sum((jnp.sum(part, dtype=jnp.uint32) for part in jax.tree.leaves(count)), jnp.uint32(0))
