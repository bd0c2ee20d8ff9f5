"""The exact k smallest scores of a tree of arrays, however it is sharded.

Sorting gathers a sharded array onto every device. Counting does not: scores become order-preserving unsigned
integers and the threshold is found two bits at a time, each step one elementwise pass and three scalar sums. Ties are
broken by index, so the result has the same bits on any mesh.

Reference: Kurtic et al. 2022 select globally by a sort; here by bisection, whose result is the same set up to ties.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

MAX_WEIGHTS = 2**32 - 1
# Three counts travel in one integer while they are small: at most 1023 elements are added up before they part.
_FIELD, _FIELD_MAX = 10, 1023
# Rows of a plain matrix that are added up first.
_FOLD = 16


def order_key(scores: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Unsigned integers in the order of the floats; −0 and +0 are equal, NaN of either sign is largest.

    >>> import jax.numpy as jnp
    >>> key = order_key(jnp.array([-1.0, -0.0, 0.0, 2.0, jnp.inf]))
    >>> bool(jnp.all(key[1:] >= key[:-1])), bool(key[1] == key[2])
    (True, True)
    """
    if scores.dtype not in (jnp.float32, jnp.float64):
        scores = scores.astype(jnp.float32)
    width = scores.dtype.itemsize * 8
    uint = jnp.uint32 if width == 32 else jnp.uint64
    bits = jax.lax.bitcast_convert_type(scores, uint)
    sign = uint(1 << (width - 1))
    # Integer comparisons throughout: the CPU backend flushes denormals in float comparisons.
    bits = jnp.where(bits == sign, uint(0), bits)
    key = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(jnp.isnan(scores), uint(2**width - 1), key)


def _flat_index(shape: tuple[int, ...], offset: int) -> UInt[Array, "..."]:
    """Row-major index of every element plus `offset`, elementwise: no reshape, so no gather when sharded."""
    index = jnp.full(shape, offset, jnp.uint32)
    stride = 1
    for dim in reversed(range(len(shape))):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
        stride *= shape[dim]
    return index


def _folded(leaf: Array) -> UInt[Array, "..."] | None:
    """Sums over the layers that a leaf stacks, or over few rows of a matrix; None where that is not to be had.

    Neither crosses devices, and what is left is small: XLA on CPU adds up to one number five times as slowly.
    """
    if leaf.ndim > 2 and leaf.shape[0] <= _FIELD_MAX:
        return jnp.sum(leaf, axis=0, dtype=jnp.uint32)
    # So many rows that a mesh splits what is left evenly, too.
    if leaf.ndim == 2 and leaf.shape[0] % (8 * _FOLD) == 0:
        return jnp.sum(leaf.reshape(-1, _FOLD, leaf.shape[1]), axis=1, dtype=jnp.uint32)
    return None


def _count(flags: list[Bool[Array, "..."]]) -> UInt[Array, ""]:
    """How many are True."""
    parts = [flag if (folded := _folded(flag)) is None else folded for flag in flags]
    return sum((jnp.sum(part, dtype=jnp.uint32) for part in jax.lax.optimization_barrier(parts)), jnp.uint32(0))


def _count_below(keys: list[UInt[Array, "..."]], candidates: list[UInt[Array, ""]]) -> list[UInt[Array, ""]]:
    """How many keys are smaller than each of three candidates."""
    counts = [jnp.uint32(0)] * len(candidates)
    for key in keys:
        flags = [key < candidate for candidate in candidates]
        fields = [flag.astype(jnp.uint32) << (_FIELD * i) for i, flag in enumerate(flags)]
        packed = _folded(functools.reduce(jnp.bitwise_or, fields))
        if packed is None:
            parts = flags
        else:
            packed = jax.lax.optimization_barrier(packed)
            parts = [packed >> (_FIELD * i) & _FIELD_MAX for i in range(len(flags))]
        counts = [total + jnp.sum(part, dtype=jnp.uint32) for total, part in zip(counts, parts, strict=True)]
    return counts


def select_smallest_in_rows(
    scores: Float[Array, "*layers inputs outputs"],
    counts: UInt[Array, "*layers outputs"],
    eligible: Bool[Array, "*layers inputs outputs"],
) -> Bool[Array, "*layers inputs outputs"]:
    """Marks, among the inputs of each output unit, the `counts` eligible ones of lowest score; ties by index.

    Counts as `select_smallest` does, once a unit; more than there are eligible ones marks them all.

    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[3.0, 0.0], [1.0, 0.0], [2.0, 5.0]])
    >>> select_smallest_in_rows(scores, jnp.array([2, 1], jnp.uint32), jnp.ones((3, 2), bool)).astype(int).tolist()
    [[0, 1], [1, 0], [1, 0]]
    """
    key = order_key(scores)
    width = jnp.dtype(key.dtype).itemsize * 8

    def in_row(flags: Bool[Array, "..."]) -> UInt[Array, "*layers 1 outputs"]:
        return jnp.sum(flags, axis=-2, keepdims=True, dtype=jnp.uint32)

    wanted = jnp.minimum(counts[..., None, :], in_row(eligible))

    def search(key: UInt[Array, "..."], among: Bool[Array, "..."], wanted: Array, width: int) -> UInt[Array, "..."]:
        """The largest value that fewer than `wanted` keys are below."""

        def bit(step: Int[Array, ""], found: UInt[Array, "..."]) -> UInt[Array, "..."]:
            candidate = found | (jnp.asarray(1, key.dtype) << (width - 1 - step).astype(key.dtype))
            return jnp.where(in_row((key < candidate) & among) < wanted, candidate, found)

        return jax.lax.fori_loop(0, width, bit, jnp.zeros(wanted.shape, key.dtype))

    threshold = search(key, eligible, wanted, width)
    below, tied = (key < threshold) & eligible, (key == threshold) & eligible
    index = jax.lax.broadcasted_iota(jnp.uint32, scores.shape, scores.ndim - 2)
    last = search(index, tied, wanted - in_row(below), 32)
    return (wanted > 0) & (below | (tied & (index <= last)))


def select_smallest(
    scores: Mapping[str, Float[Array, "..."]],
    count: int | Int[Array, ""],
    eligible: Mapping[str, Bool[Array, "..."]] | None = None,
) -> dict[str, Bool[Array, "..."]]:
    """Marks the `count` eligible elements of lowest score over the whole tree.

    Ties go to the lowest index: paths in sorted order, then row-major position.

    Args:
      scores: per path, the scores; NaN counts as the largest.
      count: how many to mark; traced values are welcome. More than there are eligible elements marks them all.
      eligible: per path, which elements may be marked; all by default.

    Returns:
      Per path, True where marked.

    Raises:
      ValueError: if the tree has more than 2³² − 1 elements, or `eligible` has other paths or shapes.

    >>> import jax.numpy as jnp
    >>> select_smallest({"a": jnp.array([3.0, 1.0, 1.0, 1.0])}, 2)["a"].tolist()
    [False, True, True, False]
    """
    paths = sorted(scores)
    total = sum(scores[path].size for path in paths)
    if total > MAX_WEIGHTS:
        raise ValueError(f"the tree has {total} scores; at most {MAX_WEIGHTS} can be counted")
    if eligible is None:
        eligible = {path: jnp.ones(scores[path].shape, bool) for path in paths}
    if sorted(eligible) != paths:
        raise ValueError(f"scores and eligible have different paths: {paths} and {sorted(eligible)}")
    for path in paths:
        if eligible[path].shape != scores[path].shape:
            raise ValueError(f"{path}: scores {scores[path].shape} but eligible {eligible[path].shape}")
    keys = [order_key(scores[path]) for path in paths]
    allowed = [eligible[path] for path in paths]
    uint = jnp.result_type(*keys) if keys else jnp.uint32
    width = jnp.dtype(uint).itemsize * 8
    # What may not be marked counts as largest, so that no candidate has it below.
    largest = jnp.asarray(2**width - 1, uint)
    keys = [jnp.where(ok, key.astype(uint), largest) for key, ok in zip(keys, allowed, strict=True)]
    keys = jax.lax.optimization_barrier(keys)
    count = jnp.minimum(jnp.asarray(count).astype(jnp.uint32), _count(allowed))

    def two_bits(step: Int[Array, ""], found: UInt[Array, ""]) -> UInt[Array, ""]:
        shift = (width - 2 - 2 * step).astype(uint)
        candidates = [found | (jnp.asarray(digit, uint) << shift) for digit in (1, 2, 3)]
        digit = sum((below < count).astype(uint) for below in _count_below(keys, candidates))
        return found | (digit << shift)

    # The count-th smallest key: the largest value with fewer than `count` keys below it.
    threshold = jax.lax.fori_loop(0, width // 2, two_bits, jnp.asarray(0, uint))
    below = [key < threshold for key in keys]
    tied = [(key == threshold) & ok for key, ok in zip(keys, allowed, strict=True)]
    needed = count - _count(below)
    offsets = [sum(scores[path].size for path in paths[:i]) for i in range(len(paths))]

    def last_tied_index() -> UInt[Array, ""]:
        def index_bit(step: Int[Array, ""], found: UInt[Array, ""]) -> UInt[Array, ""]:
            candidate = found | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
            before = _count(
                [t & (_flat_index(t.shape, offset) < candidate) for t, offset in zip(tied, offsets, strict=True)]
            )
            return jnp.where(before < needed, candidate, found)

        return jax.lax.fori_loop(0, 32, index_bit, jnp.uint32(0))

    last = jax.lax.cond(_count(tied) == needed, lambda: jnp.uint32(MAX_WEIGHTS), last_tied_index)
    is_any = count > 0
    return {
        path: is_any & (b | (t & (_flat_index(t.shape, offset) <= last)))
        for path, b, t, offset in zip(paths, below, tied, offsets, strict=True)
    }
