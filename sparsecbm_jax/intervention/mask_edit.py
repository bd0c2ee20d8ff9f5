"""Edits of one mask as arrays: application, undo, counts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import AnyMasks
from sparsecbm_jax.core.selection import count_true
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig, CBMOutput
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays


class ConceptCorrection(NamedTuple):
    """A correction on arrays: the texts whose concept is to have another class.

    Attributes:
        batch: Texts to be corrected together, usually one row. Their own labels are not read.
        concept: Index k of the corrected concept.
        target: Class that the concept should have, for all rows or for each.
        label: Task label that the texts should have, too, for all rows or for each; None or −1 for none.
        earlier: Earlier corrections, oldest first, for editors that retain them.
    """

    batch: Batch
    concept: int | Int[Array, ""]
    target: int | Int[Array, ""] | Int[Array, " B"]
    label: int | Int[Array, ""] | Int[Array, " B"] | None = None
    earlier: "tuple[ConceptCorrection, ...]" = ()


class MaskEdit(NamedTuple):
    """The changes of one intervention, which `apply` and `undo` read, and the predictions before and after it.

    Attributes:
        concept: Index of the one concept whose mask changed.
        target: Class that each row's concept should have.
        label: Task label that entered the loss, −1 for none.
        num_per_step: Weights dropped, and as many grown, in each step.
        dropped: By path, True at positions kept before and pruned now.
        grown: By path, True at positions pruned before and kept now.
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
    """Applies an edit, to the bit: dropped positions become pruned, grown positions become kept.

    Raises:
        ValueError: Concrete masks do not keep every position to be dropped and prune every position to be grown.
    """
    return _flip(masks, edit.concept, off=edit.dropped, on=edit.grown, verb="apply")


def undo(masks: AnyMasks, edit: MaskEdit) -> AnyMasks:
    """Undoes an edit, the inverse of `apply`: `undo(apply(masks, edit), edit)` is `masks` to the bit.

    Raises:
        ValueError: Concrete masks no longer hold the edit, because another one changed the same positions since.
    """
    return _flip(masks, edit.concept, off=edit.grown, on=edit.dropped, verb="undo")


def num_changed(edit: MaskEdit) -> tuple[int, int]:
    """Counts exactly the weights that an edit dropped and grew."""
    return count_true(edit.dropped), count_true(edit.grown)


def is_traced(*values: Any) -> bool:
    """Returns True where a leaf of the trees is a tracer, whose value cannot be read."""
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
    correction: ConceptCorrection,
    num_per_step: Int[Array, ""] | UInt[Array, ""],
) -> MaskEdit:
    """Returns the difference between two masks of a concept.

    Args:
        old: The concept's mask before.
        new: The concept's mask after.
        before: The model's output with the old masks.
        after: Output of the concept's subnetwork under the new mask, from `subnetwork_output`.
        correction: The correction, from `checked`.
        num_per_step: Weights dropped, and as many grown, in each step.
    """
    concept = correction.concept
    return MaskEdit(
        concept=concept,  # type: ignore[arg-type]
        target=correction.target,  # type: ignore[arg-type]
        label=correction.label,  # type: ignore[arg-type]
        num_per_step=num_per_step.astype(jnp.uint32),
        dropped={path: old[path] & ~new[path] for path in old},
        grown={path: new[path] & ~old[path] for path in old},
        concept_logits_before=before.concept_logits,
        concept_logits_after=before.concept_logits.at[:, concept].set(after.concept_logits[:, 0]),
        label_logits_before=before.label_logits,
        label_logits_after=after.label_logits,
    )


def edit_of(config: CBMConfig, old: ModelArrays, new: ModelArrays, correction: ConceptCorrection) -> MaskEdit:
    """Returns the edit that leads from one model to another, with the predictions of both for the corrected texts.

    Args:
        config: The model's static description.
        old: The model before.
        new: The model after, with another mask of the corrected concept or, if the editor trains, other weights.
        correction: The correction.

    Raises:
        ValueError: As `checked`.
    """
    forward = make_forward(config)
    correction = checked(config, old, correction)
    before, after = (forward(arrays, correction.batch) for arrays in (old, new))
    mask, new_mask = (masks_lib.concept(arrays.concept_masks, correction.concept) for arrays in (old, new))
    dropped = {path: mask[path] & ~new_mask[path] for path in mask}
    return MaskEdit(
        concept=correction.concept,  # type: ignore[arg-type]
        target=correction.target,  # type: ignore[arg-type]
        label=correction.label,  # type: ignore[arg-type]
        num_per_step=total(dropped),
        dropped=dropped,
        grown={path: new_mask[path] & ~mask[path] for path in mask},
        concept_logits_before=before.concept_logits,
        concept_logits_after=after.concept_logits,
        label_logits_before=before.label_logits,
        label_logits_after=after.label_logits,
    )


def checked(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> ConceptCorrection:
    """Returns a correction as arrays, a target and a label for each row (label −1 for none), without earlier ones.

    Raises:
        ValueError: Concept, target or label lies out of range, or the model has no masks. Traced values are not
            checked.
    """
    masks_lib.check_masks(arrays.masks)
    label = -1 if correction.label is None else correction.label
    check_index("concept", correction.concept, 0, config.num_concepts)
    check_index("target", correction.target, 0, config.num_classes)
    check_index("label", label, -1, config.num_labels)
    rows = correction.batch.input_ids.shape[:1]
    return ConceptCorrection(
        correction.batch,
        jnp.asarray(correction.concept, jnp.int32),
        jnp.broadcast_to(jnp.asarray(correction.target, jnp.int32), rows),
        jnp.broadcast_to(jnp.asarray(label, jnp.int32), rows),
    )


def check_index(name: str, value: Any, low: int, high: int) -> None:
    """Checks that a concrete index lies in [low, high); traced ones are not checked.

    Args:
        name: Name of the index, for errors.
        value: The index, or indices.
        low: Least index.
        high: One more than the largest index.

    Raises:
        ValueError: It does not.
    """
    if is_traced(value):
        return
    if np.any(np.asarray(value) < low) or np.any(np.asarray(value) >= high):
        raise ValueError(f"{name} is {value}; expected an integer in [{low}, {high - 1}]")


def total(count: UInt[Array, ""] | Mapping[str, UInt[Array, "*layers"] | Bool[Array, "..."]]) -> UInt[Array, ""]:
    """Sums counts or booleans over a tree, modulo 2^32."""
    return sum((jnp.sum(part, dtype=jnp.uint32) for part in jax.tree.leaves(count)), jnp.uint32(0))
