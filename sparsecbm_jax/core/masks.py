"""The K boolean masks: one subnetwork of the shared backbone per concept.

`Masks` maps a kernel's path to booleans with a leading concept axis; True means kept. The masks stay apart from the
parameters, and `where` makes a subnetwork of both, never a product (NaN · 0 is NaN). Inside a program the K masks of a
weight are the bits of one unsigned integer (`Packed`), so a layer's masks travel once for all concepts.

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
# Masks of either form, for functions that take both.
AnyMasks = dict[str, Bool[Array, "K ..."] | UInt[Array, "..."]]
MAX_CONCEPTS = 32


def create(params: Params, paths: Iterable[str], num_concepts: int) -> Masks:
    """Makes all-True masks: every concept starts from the dense backbone.

    Args:
        params: The backbone's parameters, or their shapes.
        paths: '/'-joined paths of the maskable kernels.
        num_concepts: K, from 1 to 32.

    Raises:
        ValueError: `num_concepts` is out of range.
        KeyError: The parameters have no leaf at one of the paths.
    """
    if not 1 <= num_concepts <= MAX_CONCEPTS:
        raise ValueError(f"num_concepts is {num_concepts}; it must be between 1 and {MAX_CONCEPTS}")
    return {path: jnp.ones((num_concepts, *leaf_at(params, path).shape), bool) for path in paths}


def num_concepts(masks: Masks) -> int:
    """Returns K, the length of the leading axis that all masks share.

    Raises:
        ValueError: The masks disagree, or there are none.
    """
    sizes = {path: mask.shape[0] for path, mask in masks.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the masks' leading axes must all be K, but are {sizes}")
    return next(iter(sizes.values()))


def num_weights(masks: AnyMasks) -> int:
    """Counts the maskable weights of the backbone, which are those of one concept, as an exact Python int."""
    return sum(math.prod(mask.shape if is_packed(mask) else mask.shape[1:]) for mask in masks.values())


def is_packed(mask: Array) -> bool:
    """Returns True where a leaf has its concepts as bits of an integer, not as booleans along its first axis."""
    return mask.dtype != jnp.bool_


def concept(masks: AnyMasks, index: int | Int[Array, ""]) -> dict[str, Bool[Array, "..."]]:
    """Returns the masks of one concept, without the concept axis; `index` may be traced."""

    def one(mask: Array) -> Bool[Array, "..."]:
        if is_packed(mask):
            return kept(mask, index)
        return jax.lax.dynamic_index_in_dim(mask, index, 0, keepdims=False)

    return {path: one(mask) for path, mask in masks.items()}


def replace_concept(masks: AnyMasks, index: int | Int[Array, ""], mask: Mapping[str, Bool[Array, "..."]]) -> AnyMasks:
    """Returns masks in which concept `index` has `mask`, packed where they were packed; `index` may be traced.

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
    """Computes θ_k = where(M_k, θ, 0), the parameters of one concept's subnetwork, as a plain tree.

    >>> import jax.numpy as jnp
    >>> apply({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([[True, False]])}, 0)["w"].tolist()
    [1.0, 0.0]

    Args:
        params: θ, the shared parameters.
        masks: The masks of all concepts.
        index: The concept, from 0 to K − 1.

    Raises:
        ValueError: A mask and its kernel have different shapes.
    """
    subnetwork: dict[str, Any] = dict(params)
    for path, mask in masks.items():
        kernel = leaf_at(params, path)
        if mask.shape[1:] != kernel.shape:
            raise ValueError(f"{path}: the mask has shape {mask.shape[1:]} but the kernel {kernel.shape}")
        subnetwork = with_leaf(subnetwork, path, jnp.where(mask[index], kernel, 0))
    return subnetwork


def kernels_of(params: Params, mask: Mapping[str, Bool[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
    """Computes θ_k on the maskable kernels alone, {path: where(mask, θ, 0)}.

    A concept's loss is differentiated with respect to these.

    >>> import jax.numpy as jnp
    >>> kernels_of({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})["w"].tolist()
    [1.0, 0.0]
    """
    return {path: jnp.where(kept, leaf_at(params, path), 0) for path, kept in mask.items()}


def num_kept(masks: Masks) -> np.ndarray:
    """Counts the kept weights of each concept exactly, [K]."""
    of_concept = [count_true(concept(masks, k)) for k in range(num_concepts(masks))]
    return np.array(of_concept, np.int64)


def total_density(masks: Masks) -> np.ndarray:
    """Computes the kept share of the maskable backbone for each concept, [K]."""
    return num_kept(masks) / num_weights(masks)


def density(masks: Masks) -> dict[str, np.ndarray]:
    """Computes the kept share of each kernel for each concept, {path: [K]}."""
    return {path: np.asarray(mask).reshape(mask.shape[0], -1).mean(axis=1) for path, mask in masks.items()}


def overlap(masks: Masks) -> np.ndarray:
    """Computes the Jaccard index |M_i ∩ M_j| / |M_i ∪ M_j| of every pair of concepts, [K, K].

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
    """Computes the expected Jaccard index of two random masks of the same density d: d / (2 − d).

    Where the second mask has another density e, it is d e / (d + e − d e).

    >>> round(chance_overlap(0.25), 3)
    0.143
    >>> round(chance_overlap(0.25, 0.5), 3)
    0.2
    """
    other = density_value if other is None else other
    either = density_value + other - density_value * other
    return density_value * other / either if either else 1.0


def packed_dtype(k: int) -> Any:
    """Returns the smallest unsigned integer type of at least `k` bits.

    Raises:
        ValueError: `k` is not in 1..32.
    """
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
    """Unpacks the masks of `k` concepts: the inverse of `pack`."""
    return {path: jnp.stack([kept(bits, i) for i in range(k)]) for path, bits in packed.items()}


def kept(bits: UInt[Array, "..."], k: int | Int[Array, ""]) -> Bool[Array, "..."]:
    """Returns bit `k` of packed masks as booleans; `k` may be traced."""
    return ((bits >> jnp.asarray(k, bits.dtype)) & 1).astype(bool)


def to_bits(masks: Masks) -> dict[str, np.ndarray]:
    """Packs masks as they lie on disk: eight booleans a byte, row-major over [K, ...]."""
    return {path: np.packbits(np.asarray(mask).reshape(-1)) for path, mask in masks.items()}


def from_bits(bits: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Masks:
    """Unpacks masks from disk: the inverse of `to_bits`.

    Args:
        bits: Bytes of every mask, by path.
        shapes: Shape of every mask, (K, ...), by path.

    Raises:
        ValueError: A leaf's bytes do not fit its shape.
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
    """Computes SHA-256 of the masks' paths, shapes and bits: equal on any mesh for equal masks."""
    digest = hashlib.sha256()
    for path, bits in sorted(to_bits(masks).items()):
        digest.update(f"{path}{masks[path].shape}".encode())
        digest.update(bits.tobytes())
    return digest.hexdigest()


class DropGrow(NamedTuple):
    """The result of `drop_and_grow` for one concept.

    Attributes:
        mask: The new mask, by path.
        dropped: True at weights that were kept and are no longer.
        grown: True at weights that were pruned and are now kept.
    """

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

    Both sets are chosen from the mask as it was, so no dropped weight grows back at once; ties go by index. The number
    of kept weights does not change as long as `count` is at most the kept and at most the pruned weights. The caller
    checks that, since `count` may be traced.

    Args:
        mask: One concept's mask, {path: booleans}.
        drop_score: Score of every weight; the lowest is dropped first.
        grow_score: Score of every weight; the highest is grown first.
        count: Number of weights to drop and to grow in the whole tree; or {path: number in each kernel}, one for every
            layer that a leaf stacks. May be traced.

    Returns:
        The new mask and the changed positions.

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
    """Applies `select_smallest` to every kernel by itself."""

    def in_one(score: Float[Array, "..."], count: Int[Array, ""], among: Bool[Array, "..."]) -> Bool[Array, "..."]:
        return select_smallest({"kernel": score}, count, {"kernel": among})["kernel"]

    return {
        path: (jax.vmap(in_one) if counts[path].ndim else in_one)(scores[path], counts[path], eligible[path])
        for path in scores
    }


def check_masks(masks: AnyMasks | None) -> None:
    """Checks that there are masks, and that they are booleans or their bits.

    Raises:
        ValueError: They are not.
    """
    if not masks:
        raise ValueError(
            "the model has no masks: a dense model has nothing to drop or grow, train with strategy 'sparse'"
        )
    for path, mask in masks.items():
        if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.unsignedinteger):
            raise ValueError(f"{path}: the masks are {mask.dtype}; expected booleans, or their bits, see masks.pack")
