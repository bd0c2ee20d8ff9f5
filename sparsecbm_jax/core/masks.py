"""The K boolean masks: one subnetwork of the shared backbone per concept.

`Masks` maps a kernel's path to booleans with a leading concept axis; True is kept. The masks stay apart from the
parameters, and a subnetwork is made by `where`, never by multiplying (NaN · 0 is NaN). Inside a program the K masks
of a weight are the bits of one unsigned integer (`Packed`), so a layer's masks travel once for all concepts.

Reference: Tan et al. 2024, 'Holistic and Intelligible Decision-making Pathways', θ_{M_k} = M_k ⊙ θ.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from sparsecbm_jax.core.selection import Count, count_true, select_smallest
from sparsecbm_jax.core.trees import Params, leaf_at, with_leaf

Masks = dict[str, Bool[Array, "K ..."]]
Packed = dict[str, UInt[Array, "..."]]
# Either of both, as it is handed through.
AnyMasks = dict[str, Bool[Array, "K ..."] | UInt[Array, "..."]]
MAX_CONCEPTS = 32


def create(params: Params, paths: Iterable[str], num_concepts: int) -> Masks:
    """All-True masks for the kernels at `paths`: every concept starts from the dense backbone.

    Raises:
        ValueError: if `num_concepts` is not in 1..32.
    """
    if not 1 <= num_concepts <= MAX_CONCEPTS:
        raise ValueError(f"num_concepts is {num_concepts}; it must be between 1 and {MAX_CONCEPTS}")
    return {path: jnp.ones((num_concepts, *leaf_at(params, path).shape), bool) for path in paths}


def num_concepts(masks: Masks) -> int:
    """K, the leading axis shared by all masks.

    Raises:
        ValueError: if the masks disagree or there are none.
    """
    sizes = {path: mask.shape[0] for path, mask in masks.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the masks' leading axes must all be K, but are {sizes}")
    return next(iter(sizes.values()))


def num_weights(masks: AnyMasks) -> int:
    """Maskable weights of the backbone (of one concept), as an exact Python int."""
    return sum(math.prod(mask.shape if is_packed(mask) else mask.shape[1:]) for mask in masks.values())


def is_packed(mask: Array) -> bool:
    """Whether a leaf has its concepts as bits of an integer, not as booleans along its first axis."""
    return mask.dtype != jnp.bool_


def concept(masks: AnyMasks, index: int | Int[Array, ""]) -> dict[str, Bool[Array, "..."]]:
    """The masks of one concept, without the concept axis; `index` may be traced."""

    def one(mask: Array) -> Bool[Array, "..."]:
        if is_packed(mask):
            return kept(mask, index)
        return jax.lax.dynamic_index_in_dim(mask, index, 0, keepdims=False)

    return {path: one(mask) for path, mask in masks.items()}


def replace_concept(masks: AnyMasks, index: int | Int[Array, ""], mask: Mapping[str, Bool[Array, "..."]]) -> AnyMasks:
    """New masks in which concept `index` has `mask`, packed where they were; `index` may be traced.

    >>> import jax.numpy as jnp
    >>> bits = replace_concept({"w": jnp.array([3, 2], jnp.uint8)}, 1, {"w": jnp.array([False, True])})
    >>> bits["w"].tolist()
    [1, 2]
    """

    def one(old: Array, new: Bool[Array, "..."]) -> Array:
        if not is_packed(old):
            return jax.lax.dynamic_update_index_in_dim(old, new, index, 0)
        shift = jnp.asarray(index, old.dtype)
        return (old & ~(jnp.ones((), old.dtype) << shift)) | (new.astype(old.dtype) << shift)

    return {path: one(masks[path], mask[path]) for path in masks}


def apply(params: Params, masks: Masks, index: int) -> dict[str, Any]:
    """θ_k = where(M_k, θ, 0): the parameters of one concept's subnetwork, as a plain tree.

    >>> import jax.numpy as jnp
    >>> apply({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([[True, False]])}, 0)["w"].tolist()
    [1.0, 0.0]
    """
    subnetwork: dict[str, Any] = dict(params)
    for path, mask in masks.items():
        kernel = leaf_at(params, path)
        if mask.shape[1:] != kernel.shape:
            raise ValueError(f"{path}: the mask has shape {mask.shape[1:]} but the kernel {kernel.shape}")
        subnetwork = with_leaf(subnetwork, path, jnp.where(mask[index], kernel, 0))
    return subnetwork


def kernels_of(params: Params, mask: Mapping[str, Bool[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
    """θ_k on the maskable kernels alone, {path: where(mask, θ, 0)}: what one concept's loss is differentiated by.

    >>> import jax.numpy as jnp
    >>> kernels_of({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})["w"].tolist()
    [1.0, 0.0]
    """
    return {path: jnp.where(kept, leaf_at(params, path), 0) for path, kept in mask.items()}


def num_kept(masks: Masks) -> np.ndarray:
    """Kept weights of each concept, [K], exact."""
    of_concept = [count_true(concept(masks, k)) for k in range(num_concepts(masks))]
    return np.array(of_concept, np.int64)


def total_density(masks: Masks) -> np.ndarray:
    """Kept share of the maskable backbone for each concept, [K]."""
    return num_kept(masks) / num_weights(masks)


def density(masks: Masks) -> dict[str, np.ndarray]:
    """Kept share of each kernel for each concept, {path: [K]}."""
    return {path: np.asarray(mask).reshape(mask.shape[0], -1).mean(axis=1) for path, mask in masks.items()}


def overlap(masks: Masks) -> np.ndarray:
    """Jaccard index |M_i ∩ M_j| / |M_i ∪ M_j| of every pair of concepts, [K, K].

    At density d two random masks of equal density have about d / (2 − d) (`chance_overlap`).
    """
    k = num_concepts(masks)
    both = np.zeros((k, k), np.int64)
    for mask in masks.values():
        rows = np.asarray(mask).reshape(k, -1)
        for i in range(k):
            for j in range(i, k):
                both[i, j] += np.count_nonzero(rows[i] & rows[j])
    both = both + np.triu(both, 1).T
    kept = both.diagonal()
    either = kept[:, None] + kept[None, :] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def chance_overlap(density_value: float, other: float | None = None) -> float:
    """Expected Jaccard index of two random masks of the same density d: d / (2 − d).

    Where the other one's density e differs, d e / (d + e − d e).

    >>> round(chance_overlap(0.25), 3)
    0.143
    >>> round(chance_overlap(0.25, 0.5), 3)
    0.2
    """
    other = density_value if other is None else other
    either = density_value + other - density_value * other
    return density_value * other / either if either else 1.0


def packed_dtype(k: int) -> Any:
    """The smallest unsigned integer with K bits."""
    if not 1 <= k <= MAX_CONCEPTS:
        raise ValueError(f"{k} concepts cannot be packed; between 1 and {MAX_CONCEPTS} can")
    return jnp.uint8 if k <= 8 else jnp.uint16 if k <= 16 else jnp.uint32


def pack(masks: Mapping[str, Bool[Array, "K ..."]]) -> Packed:
    """Packs K masks into one unsigned integer a weight; bit k is concept k.

    >>> import jax.numpy as jnp
    >>> pack({"w": jnp.array([[True, False], [True, True]])})["w"].tolist()
    [3, 2]
    """

    def one(mask: Bool[Array, "K ..."]) -> UInt[Array, "..."]:
        dtype = packed_dtype(mask.shape[0])
        bits = jnp.zeros(mask.shape[1:], dtype)
        for k in range(mask.shape[0]):
            bits = bits | (mask[k].astype(dtype) << k)
        return bits

    return {path: one(mask) for path, mask in masks.items()}


def unpack(packed: Packed, k: int) -> Masks:
    """The inverse of `pack`."""
    return {path: jnp.stack([kept(bits, i) for i in range(k)]) for path, bits in packed.items()}


def kept(bits: UInt[Array, "..."], k: int | Int[Array, ""]) -> Bool[Array, "..."]:
    """Bit k of packed masks as booleans; `k` may be traced."""
    return ((bits >> jnp.asarray(k, bits.dtype)) & 1).astype(bool)


def to_bits(masks: Masks) -> dict[str, np.ndarray]:
    """The masks at rest: eight booleans a byte, row-major over [K, ...]."""
    return {path: np.packbits(np.asarray(mask).reshape(-1)) for path, mask in masks.items()}


def from_bits(bits: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Masks:
    """The inverse of `to_bits`.

    Raises:
        ValueError: if a leaf's bytes do not fit its shape.
    """
    masks: Masks = {}
    for path, shape in shapes.items():
        size = int(np.prod(shape))
        if bits[path].size != -(-size // 8):
            raise ValueError(
                f"{path}: {bits[path].size} bytes of mask bits, but the shape {shape} needs {-(-size // 8)}"
            )
        masks[path] = jnp.asarray(np.unpackbits(np.asarray(bits[path]), count=size).astype(bool).reshape(shape))
    return masks


def fingerprint(masks: Masks) -> str:
    """SHA-256 of the masks' paths, shapes and bits: equal on any mesh for equal masks."""
    digest = hashlib.sha256()
    for path, bits in sorted(to_bits(masks).items()):
        digest.update(f"{path}{masks[path].shape}".encode())
        digest.update(bits.tobytes())
    return digest.hexdigest()


class DropGrow(NamedTuple):
    """The result of `drop_and_grow` for one concept: the new mask and the positions that changed."""

    mask: dict[str, Bool[Array, "..."]]
    dropped: dict[str, Bool[Array, "..."]]
    grown: dict[str, Bool[Array, "..."]]


def drop_and_grow(
    mask: Mapping[str, Bool[Array, "..."]],
    drop_score: Mapping[str, Float[Array, "..."]],
    grow_score: Mapping[str, Float[Array, "..."]],
    count: int | Int[Array, ""] | Count | Mapping[str, Int[Array, "*layers"]],
) -> DropGrow:
    """Drops the `count` kept weights of lowest drop score and grows the `count` pruned ones of highest grow score.

    Both sets are chosen from the mask as it was, so nothing dropped grows back at once; ties go by index. The number
    of kept weights does not change as long as `count` is at most the kept and at most the pruned weights: the caller
    checks that, since `count` may be traced.

    Args:
        mask: one concept's mask, {path: booleans}.
        drop_score: lowest is dropped first.
        grow_score: highest is grown first.
        count: how many to drop and to grow in the whole tree, or {path: how many in each kernel}, a number for every
            layer that a leaf stacks; may be traced.

    Reference: Tan et al. 2024, 'Sparsity-based Inference-time intervention', after Evci et al. 2020 (RigL).
    """
    pruned = {path: ~kept_here for path, kept_here in mask.items()}
    lowest = {path: -score for path, score in grow_score.items()}
    if isinstance(count, Mapping):
        dropped, grown = _select_in_kernels(drop_score, count, mask), _select_in_kernels(lowest, count, pruned)
    else:
        dropped = select_smallest(drop_score, count, mask)
        # One after the other, so that the keys of both are not in memory at once.
        dropped, lowest = jax.lax.optimization_barrier((dropped, lowest))
        grown = select_smallest(lowest, count, pruned)
    return DropGrow({path: (mask[path] & ~dropped[path]) | grown[path] for path in mask}, dropped, grown)


def _select_in_kernels(
    scores: Mapping[str, Float[Array, "..."]],
    counts: Mapping[str, Int[Array, "*layers"]],
    eligible: Mapping[str, Bool[Array, "..."]],
) -> dict[str, Bool[Array, "..."]]:
    """`select_smallest` of every kernel by itself."""

    def in_one(score: Float[Array, "..."], count: Int[Array, ""], among: Bool[Array, "..."]) -> Bool[Array, "..."]:
        return select_smallest({"kernel": score}, count, {"kernel": among})["kernel"]

    return {
        path: (jax.vmap(in_one) if counts[path].ndim else in_one)(scores[path], counts[path], eligible[path])
        for path in scores
    }


def check_masks(masks: AnyMasks | None) -> None:
    """Raises ValueError where there are no masks, or neither booleans nor their bits."""
    if not masks:
        raise ValueError(
            "the model has no masks: a dense model has nothing to drop or grow, train with strategy 'sparse'"
        )
    for path, mask in masks.items():
        if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.unsignedinteger):
            raise ValueError(f"{path}: the masks are {mask.dtype}; expected booleans, or their bits, see masks.pack")
