"""Exact selection of the k smallest scores of a tree of arrays, under any sharding.

Sorting gathers a sharded array onto every device. Counting does not: scores become order-preserving unsigned
integers, and the threshold is found two bits at a time, each step one elementwise pass and three counts. Ties are
broken by index, so the result has the same bits on any mesh. Programs have no integers of 64 bits, and the kernels of
a large model have more than 2³² weights, so counts are pairs of integers.

Reference: Kurtic et al. 2022 select globally by a sort; here by bisection, whose result is the same set up to ties.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

# A count is high · 2¹⁶ + low, the low part below 2¹⁶.
Count = UInt[Array, " 2"]
_LOW = 16
_MAX_UINT = 2**32 - 1
# Three counts share one integer while they are small: at most 1023 elements are added up before they are separated.
_FIELD, _FIELD_MAX = 10, 1023
# Number of rows of a plain matrix that are added up first.
_FOLD = 16


def order_key(scores: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Maps floats to unsigned integers of the same width in the same order.

    −0 and +0 are equal; NaN of either sign is largest.

    >>> import jax.numpy as jnp
    >>> key = order_key(jnp.array([-1.0, -0.0, 0.0, 2.0, jnp.inf]))
    >>> bool(jnp.all(key[1:] >= key[:-1])), bool(key[1] == key[2])
    (True, True)
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores.astype(jnp.float32)
    width = scores.dtype.itemsize * 8
    uint = {16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[width]
    bits = jax.lax.bitcast_convert_type(scores, uint)
    sign = uint(1 << (width - 1))
    # Integer comparisons throughout: the CPU backend flushes denormals in float comparisons.
    bits = jnp.where(bits == sign, uint(0), bits)
    key = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(jnp.isnan(scores), uint(2**width - 1), key)


def exact_count(number: int | np.integer | UInt[Array, ""] | Count) -> Count:
    """Turns a number into a pair of integers; it may be traced, and is below 2⁴⁸.

    >>> exact_count(5 * 2**30).tolist()
    [81920, 0]
    """
    if isinstance(number, (int, np.integer)):
        return jnp.array([int(number) >> _LOW, int(number) & (2**_LOW - 1)], jnp.uint32)
    number = jnp.asarray(number)
    if number.ndim:
        return number
    number = number.astype(jnp.uint32)
    return jnp.stack([number >> _LOW, number & (2**_LOW - 1)])


def count_true(flags: Mapping[str, Bool[Array, "..."]]) -> int:
    """Counts the True elements of a tree of booleans.

    >>> import jax.numpy as jnp
    >>> count_true({"w": jnp.array([[True, False], [True, True]])})
    3
    """
    high, low = np.asarray(_count_of_tree(dict(flags)))
    return (int(high) << _LOW) + int(low)


@jax.jit
def _count_of_tree(flags: Mapping[str, Bool[Array, "..."]]) -> Count:
    return _count(list(flags.values()))


def _carried(high: UInt[Array, ""], low: UInt[Array, ""]) -> Count:
    return jnp.stack([high + (low >> _LOW), low & (2**_LOW - 1)])


def _plus(first: Count, second: Count) -> Count:
    return _carried(first[0] + second[0], first[1] + second[1])


def _minus(first: Count, second: Count) -> Count:
    """Subtracts a count that is not larger."""
    borrowed = (first[1] < second[1]).astype(jnp.uint32)
    return jnp.stack([first[0] - second[0] - borrowed, (first[1] - second[1]) & (2**_LOW - 1)])


def _is_less(first: Count, second: Count) -> Bool[Array, ""]:
    return (first[0] < second[0]) | ((first[0] == second[0]) & (first[1] < second[1]))


def _sum(part: UInt[Array, "..."] | Bool[Array, "..."]) -> Count:
    """Sums a leaf that `_check_countable` has accepted."""
    rows = jnp.sum(jnp.atleast_1d(part), axis=range(max(0, part.ndim - 1)), dtype=jnp.uint32)
    parts = (rows >> _LOW, rows & (2**_LOW - 1))
    return _carried(*(jnp.sum(one, dtype=jnp.uint32) for one in parts))


def _sum_of_counts(part: UInt[Array, "..."]) -> Count:
    """Sums at most 2²⁴ counts; the sum is below 2⁴⁰."""
    half = _LOW // 2
    high, low = jnp.sum(part >> half, dtype=jnp.uint32), jnp.sum(part & (2**half - 1), dtype=jnp.uint32)
    return _carried(high >> (_LOW - half), ((high & (2 ** (_LOW - half) - 1)) << half) + low)


def _largest_with_fewer(count_before: Callable[[UInt[Array, ""]], Count], needed: Count, most: int) -> UInt[Array, ""]:
    """Finds the largest number up to `most` with fewer than `needed` elements before it."""
    bits = most.bit_length()

    def bit(step: Int[Array, ""], found: UInt[Array, ""]) -> UInt[Array, ""]:
        candidate = found | (jnp.uint32(1) << (bits - 1 - step).astype(jnp.uint32))
        return jnp.where(_is_less(count_before(candidate), needed), candidate, found)

    return jax.lax.fori_loop(0, bits, bit, jnp.uint32(0))


def _check_countable(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for path, shape in shapes.items():
        size, width = math.prod(shape), shape[-1] if shape else 1
        if size > _MAX_UINT and (size // width > _MAX_UINT or width > 2**_LOW):
            raise ValueError(
                f"{path}: an array of {shape} cannot be counted; expected at most {_MAX_UINT} elements, or rows of at "
                f"most {2**_LOW}"
            )


def _places(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[UInt[Array, "..."], UInt[Array, "..."]]]:
    """Returns the row of each leaf's elements, counted on from leaf to leaf, and their column.

    Both broadcast to the leaf without a reshape, so that nothing is gathered when it is sharded. The barrier gives each
    leaf numbers of its own. If two leaves of one shape shared them, they would be sharded as one of the leaves is, and
    the other leaf would be gathered to meet them.
    """
    places, offset = [], 0
    for shape in shapes.values():
        thin = (*shape[:-1], 1) if shape else ()
        row, stride = jnp.full(thin, offset, jnp.uint32), 1
        for dim in reversed(range(len(shape) - 1)):
            row = row + jax.lax.broadcasted_iota(jnp.uint32, thin, dim) * jnp.uint32(stride)
            stride *= shape[dim]
        flat = (1,) * (len(shape) - 1) + shape[-1:]
        column = jax.lax.broadcasted_iota(jnp.uint32, flat, len(shape) - 1) if shape else jnp.uint32(0)
        places.append(jax.lax.optimization_barrier((row, column)))
        offset += stride
    return places


def _folded(leaf: Array) -> UInt[Array, "..."] | None:
    """Sums over the layers that a leaf stacks, or over few rows of a matrix; returns None where neither is possible.

    Neither sum crosses devices, and the result is small: XLA on CPU sums everything to one number five times as slowly.
    """
    if leaf.ndim > 2 and leaf.shape[0] <= _FIELD_MAX:
        return jnp.sum(leaf, axis=0, dtype=jnp.uint32)
    # Enough rows that a mesh also splits the result evenly.
    if leaf.ndim == 2 and leaf.shape[0] % (8 * _FOLD) == 0:
        return jnp.sum(leaf.reshape(-1, _FOLD, leaf.shape[1]), axis=1, dtype=jnp.uint32)
    return None


def _count(flags: list[Bool[Array, "..."]]) -> Count:
    """Counts the True elements."""

    def in_steps(flag: Bool[Array, "..."]) -> Count:
        folded = _folded(flag)
        return _sum(jax.lax.optimization_barrier(flag if folded is None else folded))

    def one(flag: Bool[Array, "..."]) -> Count:
        # A TPU's tile has 32 rows of booleans. Where sums over half a tile meet, its compiler (libtpu 0.0.52) ends the
        # process. That happens for OPT-350M's projections, which no layer stacks.
        return jax.lax.platform_dependent(flag, tpu=_sum, default=in_steps) if flag.ndim == 2 else in_steps(flag)

    return functools.reduce(_plus, map(one, flags), exact_count(0))


def _count_below(keys: list[UInt[Array, "..."]], candidates: list[UInt[Array, ""]]) -> list[Count]:
    """Counts the keys that are smaller than each of three candidates."""
    counts = [exact_count(0)] * len(candidates)
    for key in keys:
        flags = [key < candidate for candidate in candidates]
        fields = [flag.astype(jnp.uint32) << (_FIELD * i) for i, flag in enumerate(flags)]
        packed = _folded(functools.reduce(jnp.bitwise_or, fields))
        if packed is None:
            parts = flags
        else:
            packed = jax.lax.optimization_barrier(packed)
            parts = [packed >> (_FIELD * i) & _FIELD_MAX for i in range(len(flags))]
        counts = [_plus(total, _sum(part)) for total, part in zip(counts, parts, strict=True)]
    return counts


def select_smallest_in_rows(
    scores: Float[Array, "*layers inputs outputs"],
    counts: UInt[Array, "*layers outputs"],
    eligible: Bool[Array, "*layers inputs outputs"],
) -> Bool[Array, "*layers inputs outputs"]:
    """Marks, among the inputs of each output unit, the `counts` eligible ones of lowest score; ties go by index.

    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[3.0, 0.0], [1.0, 0.0], [2.0, 5.0]])
    >>> select_smallest_in_rows(scores, jnp.array([2, 1], jnp.uint32), jnp.ones((3, 2), bool)).astype(int).tolist()
    [[0, 1], [1, 0], [1, 0]]

    Args:
        scores: Scores of the inputs of every output unit.
        counts: Number of inputs to mark for each unit; a number above that of eligible inputs marks all of those.
        eligible: True at inputs that may be marked.
    """
    key = order_key(scores)
    width = jnp.dtype(key.dtype).itemsize * 8

    def in_row(flags: Bool[Array, "..."]) -> UInt[Array, "*layers 1 outputs"]:
        return jnp.sum(flags, axis=-2, keepdims=True, dtype=jnp.uint32)

    quota = jnp.minimum(counts[..., None, :], in_row(eligible))

    def search(key: UInt[Array, "..."], among: Bool[Array, "..."], quota: Array, width: int) -> UInt[Array, "..."]:
        """Finds the largest value that fewer than `quota` keys are below."""

        def bit(step: Int[Array, ""], found: UInt[Array, "..."]) -> UInt[Array, "..."]:
            candidate = found | (jnp.asarray(1, key.dtype) << (width - 1 - step).astype(key.dtype))
            return jnp.where(in_row((key < candidate) & among) < quota, candidate, found)

        return jax.lax.fori_loop(0, width, bit, jnp.zeros(quota.shape, key.dtype))

    threshold = search(key, eligible, quota, width)
    below, tied = (key < threshold) & eligible, (key == threshold) & eligible
    index = jax.lax.broadcasted_iota(jnp.uint32, scores.shape, scores.ndim - 2)
    last = search(index, tied, quota - in_row(below), 32)
    return (quota > 0) & (below | (tied & (index <= last)))


def select_smallest(
    scores: Mapping[str, Float[Array, "..."]],
    count: int | Int[Array, ""] | Count,
    eligible: Mapping[str, Bool[Array, "..."]] | None = None,
) -> dict[str, Bool[Array, "..."]]:
    """Marks the `count` eligible elements of lowest score over the whole tree.

    Ties go to the lowest index: paths in sorted order, then row-major position.

    Args:
        scores: Scores by path; NaN counts as the largest.
        count: Number of elements to mark; may be traced, or come from `exact_count`. A number above that of eligible
            elements marks all of those.
        eligible: True at elements that may be marked, by path; None makes all eligible.

    Returns:
        True at marked elements, by path.

    Raises:
        ValueError: A leaf is too large to be counted, or `eligible` has other paths or shapes.

    >>> import jax.numpy as jnp
    >>> select_smallest({"a": jnp.array([3.0, 1.0, 1.0, 1.0])}, 2)["a"].tolist()
    [False, True, True, False]
    """
    paths = sorted(scores)
    shapes = {path: scores[path].shape for path in paths}
    _check_countable(shapes)
    if eligible is None:
        eligible = {path: jnp.ones(scores[path].shape, bool) for path in paths}
    if sorted(eligible) != paths:
        raise ValueError(f"scores and eligible have different paths: {paths} and {sorted(eligible)}")
    for path in paths:
        if eligible[path].shape != scores[path].shape:
            raise ValueError(f"{path}: scores {scores[path].shape} but eligible {eligible[path].shape}")
    dtype = jnp.result_type(*scores.values()) if scores else jnp.float32
    keys = [order_key(scores[path].astype(dtype)) for path in paths]
    allowed = [eligible[path] for path in paths]
    uint = keys[0].dtype if keys else jnp.uint32
    width = jnp.dtype(uint).itemsize * 8
    # Elements that may not be marked count as largest, so that they are below no candidate.
    largest = jnp.asarray(2**width - 1, uint)
    keys = [jnp.where(ok, key, largest) for key, ok in zip(keys, allowed, strict=True)]
    keys = jax.lax.optimization_barrier(keys)
    quota, most = exact_count(count), _count(allowed)
    quota = jnp.where(_is_less(quota, most), quota, most)

    def two_bits(step: Int[Array, ""], found: UInt[Array, ""]) -> UInt[Array, ""]:
        shift = (width - 2 - 2 * step).astype(uint)
        candidates = [found | (jnp.asarray(digit, uint) << shift) for digit in (1, 2, 3)]
        digit = sum(_is_less(below, quota).astype(uint) for below in _count_below(keys, candidates))
        return found | (digit << shift)

    # The smallest key that is marked last: the largest value with fewer than `quota` keys below it.
    threshold = jax.lax.fori_loop(0, width // 2, two_bits, jnp.asarray(0, uint))
    below = [key < threshold for key in keys]
    tied = [(key == threshold) & ok for key, ok in zip(keys, allowed, strict=True)]
    needed = _minus(quota, _count(below))

    def last_tied() -> tuple[UInt[Array, ""], UInt[Array, ""]]:
        """Finds row and column of the last tied element to mark, from counts of rows, then of that row's columns."""
        rows = [row for row, _ in _places(shapes)]
        of_row = [jnp.sum(t, axis=range(t.ndim)[-1:], keepdims=True, dtype=jnp.uint32) for t in tied]
        of_row = jax.lax.optimization_barrier(of_row)

        def before_row(row: UInt[Array, ""]) -> Count:
            parts = [jnp.where(number < row, tied_in, 0) for number, tied_in in zip(rows, of_row, strict=True)]
            return functools.reduce(_plus, map(_sum_of_counts, parts), exact_count(0))

        last_row = _largest_with_fewer(before_row, needed, sum(math.prod(shape[:-1]) for shape in shapes.values()))
        rest = _minus(needed, before_row(last_row))
        # Only one leaf has the row.
        of_column = [
            jnp.sum(t & (row == last_row), axis=range(t.ndim - 1), dtype=jnp.uint32)
            for t, row in zip(tied, rows, strict=True)
        ]
        of_column = jax.lax.optimization_barrier(of_column)

        def before_column(column: UInt[Array, ""]) -> Count:
            parts = [jnp.where(jnp.arange(here.size) < column, here, 0) for here in map(jnp.atleast_1d, of_column)]
            return functools.reduce(_plus, map(_sum_of_counts, parts), exact_count(0))

        widest = max((shape[-1] for shape in shapes.values() if shape), default=1)
        return last_row, _largest_with_fewer(before_column, rest, widest)

    everything = jnp.uint32(_MAX_UINT), jnp.uint32(_MAX_UINT)
    last_row, last_column = jax.lax.cond(jnp.all(_count(tied) == needed), lambda: everything, last_tied)
    is_any = _is_less(exact_count(0), quota)
    return {
        path: is_any & (b | (t & ((row < last_row) | ((row == last_row) & (column <= last_column)))))
        for path, b, t, (row, column) in zip(paths, below, tied, _places(shapes), strict=True)
    }
