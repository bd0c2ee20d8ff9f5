"""Block-wise WoodFisher: the empirical Fisher of a kernel, its inverse, the pruning score ρ_Q and the optimal update.

Pure array maths that knows no model and no data. A kernel is seen as N blocks of b weights; the Fisher is

    F = ζ I + (1/m) Σ_i g_i g_iᵀ,  block-diagonal,                                   (Eq. 7)

and the loss increase of removing the weights Q of one block, the others moving to their optimum, is

    ρ_Q = ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q.                                                   (Eq. 11)

Three forms of F⁻¹, which agree wherever float32 allows all three:

    gram   sums outer products (4 b bytes a weight, whatever m) and sweeps b × b blocks;
    dual   keeps the gradients (4 m bytes a weight) and sweeps m × m systems: for m < b;
    qr     triangularises [G/√m; √ζ I], never squaring the gradients: for blocks whose Fisher float32 cannot invert.

Reference: Tan et al. 2024, Appendix C; Kurtic et al. 2022 (oBERT).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Blocks inverted at a time: at b = 64 in float32 a megabyte, which stays in a core's cache.
SLICE = 64
# The relative error of diag F⁻¹ is at most so many times the condition that a form sees (`saliency`, `dual_saliency`),
# and beyond LARGEST_ERROR a block is not to be trusted: found by experiment over gradients of rms 1e-6 to 1,
# independent and of rank 5, at ζ = 1e-7, with m from 20 to 1024.
GRAM_ERROR, DUAL_ERROR, LARGEST_ERROR = 1e-6, 2e-7, 1e-3
_HIGHEST = jax.lax.Precision.HIGHEST

# (weights [S, b], inverse Fisher [S, b, b]) → scores [S, b]
ScoreFn = Callable[[Float[Array, "S b"], Float[Array, "S b b"]], Float[Array, "S b"]]


def to_blocks(kernel: Float[Array, "*batch inputs outputs"], block_size: int) -> Float[Array, "N b"]:
    """Views a kernel as blocks of `block_size` consecutive inputs of one output unit.

    A Flax kernel is (inputs, outputs), so outputs come first here: the blocks that PyTorch tools get by flattening
    (outputs, inputs). Inputs that do not fill the last block are padded with zeros; with zero gradients a padded
    weight is decoupled from the real ones and scores zero.

    >>> import jax.numpy as jnp
    >>> to_blocks(jnp.arange(6.0).reshape(3, 2), 2).tolist()
    [[0.0, 2.0], [4.0, 0.0], [1.0, 3.0], [5.0, 0.0]]
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    rows = jnp.swapaxes(kernel, -1, -2)
    padding = -rows.shape[-1] % block_size
    if padding:
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, padding)])
    return rows.reshape(-1, block_size)


def from_blocks(blocks: Float[Array, "N b"], shape: tuple[int, ...]) -> Float[Array, "*batch inputs outputs"]:
    """The inverse of `to_blocks` for a kernel of `shape`; padding is cut off.

    >>> import jax.numpy as jnp
    >>> kernel = jnp.arange(6.0).reshape(3, 2)
    >>> bool(jnp.all(from_blocks(to_blocks(kernel, 2), kernel.shape) == kernel))
    True
    """
    *batch, inputs, outputs = shape
    padded = inputs + (-inputs % blocks.shape[-1])
    return jnp.swapaxes(blocks.reshape(*batch, outputs, padded)[..., :inputs], -1, -2)


def gram(gradients: Float[Array, "N u b"]) -> Float[Array, "N b b"]:
    """Σ_i g_i g_iᵀ of every block over u gradients.

    >>> import jax.numpy as jnp
    >>> gram(jnp.array([[[1.0, 2.0], [0.0, 1.0]]]))[0].tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    return jnp.einsum("nub,nuc->nbc", gradients, gradients, precision=_HIGHEST)


def _invert_slice(blocks: Float[Array, "S b b"]) -> Float[Array, "S b b"]:
    """Sweep operator on a slice of symmetric positive-definite blocks; see `inverse`."""
    scale = jax.lax.rsqrt(jnp.diagonal(blocks, axis1=1, axis2=2))
    # Blocks on the last axis, so that every step is a long vector operation; static pivots, since a traced one costs
    # ten times as much on CPU.
    work = jnp.moveaxis(blocks * scale[:, :, None] * scale[:, None, :], 0, -1)
    for pivot in range(blocks.shape[-1]):
        row = work[pivot]
        d = row[pivot]
        left = row.at[pivot].set(d - 1)
        right = (row / d[None]).at[pivot].set(1 - 1 / d)
        left, right = jax.lax.optimization_barrier((left, right))
        work = (work - left[:, None, :] * right[None, :, :]).at[pivot, pivot].set(-1 / d)
    return -jnp.moveaxis(work, -1, 0) * scale[:, :, None] * scale[:, None, :]


def _map_slices(
    function: Callable[..., Float[Array, "S ..."]], *leaves: Float[Array, "N ..."]
) -> Float[Array, "N ..."]:
    """Applies `function` to cache-sized slices of blocks, the last slice padded with zeros."""
    num = leaves[0].shape[0]
    padding = -num % SLICE
    if padding:
        leaves = tuple(jnp.pad(leaf, ((0, padding), *((0, 0),) * (leaf.ndim - 1))) for leaf in leaves)
    sliced = tuple(leaf.reshape(-1, SLICE, *leaf.shape[1:]) for leaf in leaves)
    mapped = jax.lax.map(lambda parts: function(*parts), sliced)
    return mapped.reshape(-1, *mapped.shape[2:])[:num]


def inverse(matrices: Float[Array, "N b b"]) -> Float[Array, "N b b"]:
    """Inverts symmetric positive-definite blocks by the sweep operator, in plain XLA and in cache-sized slices.

    Sweeping every pivot p turns A into −A⁻¹: a_ij ← a_ij − a_ip a_pj / d for i, j ≠ p, row and column p ← a_p / d and
    a_pp ← −1/d, where d = a_pp. With a unit diagonal to start from, d ≤ 1 throughout, so that row and column p come
    out of the same rank-1 update (u_p = d − 1 adds terms of one sign) and a step is a single fused pass.
    No pivoting is needed for a positive-definite matrix. A library call would run multi-threaded BLAS on each small
    block, whose speed depends on what else the machine does.

    >>> import jax.numpy as jnp
    >>> inverse(jnp.array([[[2.0, 0.0], [0.0, 4.0]]]))[0].round(6).tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    return _map_slices(_invert_slice, matrices)


def saliency(
    weights: Float[Array, "N b"],
    grams: Float[Array, "N b b"],
    num_grads: int | Float[Array, ""],
    damping: float | Float[Array, ""],
    score: ScoreFn | None = None,
) -> tuple[Float[Array, "N b"], Float[Array, " N"]]:
    """ρ_Q of every weight, straight from the summed outer products; inverses live for one slice only.

    Args:
      weights: θ_k in blocks.
      grams: Σ_i g_i g_iᵀ in blocks.
      num_grads: m, the gradients really seen.
      damping: ζ, absolute; see `relative_damping`.
      score: what is made of weights and inverse; `single_scores` by default.

    Returns:
      The scores, and an estimate of the relative error of each block's diag F⁻¹, from max_i F_ii [F⁻¹]_ii.
    """

    def scored(weight_slice: Float[Array, "S b"], gram_slice: Float[Array, "S b b"]) -> Float[Array, "S b+1"]:
        fisher = dampened(gram_slice, num_grads, damping)
        inverses = _invert_slice(fisher)
        diagonals = [jnp.diagonal(leaf, axis1=1, axis2=2) for leaf in (fisher, inverses)]
        error = _error(diagonals[1], GRAM_ERROR * jnp.max(diagonals[0] * diagonals[1], axis=1))
        return _beside((score or single_scores)(weight_slice, inverses), error)

    return _apart(_map_slices(scored, weights, grams))


def _error(diagonal: Float[Array, "S b"], estimate: Float[Array, " S"]) -> Float[Array, " S"]:
    """Infinite where an inverse has come out as none can be."""
    return jnp.where((diagonal > 0).all(axis=1) & jnp.isfinite(estimate), estimate, jnp.inf)


def _beside(scores: Float[Array, "S b"], error: Float[Array, " S"]) -> Float[Array, "S b+1"]:
    return jnp.concatenate([scores, error[:, None]], axis=1)


def _apart(both: Float[Array, "N b+1"]) -> tuple[Float[Array, "N b"], Float[Array, " N"]]:
    return both[:, :-1], both[:, -1]


def dual_saliency(
    weights: Float[Array, "N b"],
    gradients: Float[Array, "N m b"],
    damping: float | Float[Array, ""],
    score: ScoreFn | None = None,
) -> tuple[Float[Array, "N b"], Float[Array, " N"]]:
    """The same from the gradients themselves: m × m systems instead of b × b, for m < b.

    With G the m gradients of a block as rows, F⁻¹ = (I − Gᵀ (m ζ I + G Gᵀ)⁻¹ G) / ζ (Woodbury), of which single
    weights need the diagonal only. What the difference loses is part of the estimated error.
    """

    def scored(weight_slice: Float[Array, "S b"], rows: Float[Array, "S m b"]) -> Float[Array, "S b+1"]:
        system = _dual_system(rows, damping)
        solver = _invert_slice(system)
        solved = jnp.einsum("smn,snb->smb", solver, rows, precision=_HIGHEST)
        left = 1 - jnp.sum(rows * solved, axis=1)
        diagonals = [jnp.diagonal(leaf, axis1=1, axis2=2) for leaf in (system, solver)]
        condition = jnp.max(diagonals[0] * diagonals[1], axis=1) / jnp.min(left, axis=1)
        error = _error(jnp.concatenate([left, diagonals[1]], axis=1), DUAL_ERROR * condition)
        if score is None:
            return _beside(weight_slice**2 * damping / (2 * left), error)
        return _beside(score(weight_slice, _dual_inverse_slice(rows, solved, damping)), error)

    return _apart(_map_slices(scored, weights, gradients))


def _dual_system(rows: Float[Array, "S m b"], damping: float | Float[Array, ""]) -> Float[Array, "S m m"]:
    """m ζ I + G Gᵀ."""
    outer = jnp.einsum("smb,snb->smn", rows, rows, precision=_HIGHEST)
    return outer + rows.shape[1] * damping * jnp.eye(rows.shape[1], dtype=rows.dtype)[None]


def _dual_inverse_slice(
    rows: Float[Array, "S m b"], solved: Float[Array, "S m b"], damping: float | Float[Array, ""]
) -> Float[Array, "S b b"]:
    projected = jnp.einsum("smb,smc->sbc", rows, solved, precision=_HIGHEST)
    return (jnp.eye(rows.shape[-1], dtype=rows.dtype)[None] - projected) / damping


def dual_inverse(gradients: Float[Array, "N m b"], damping: float | Float[Array, ""]) -> Float[Array, "N b b"]:
    """F⁻¹ of every block by the dual form; see `dual_saliency`."""

    def invert(rows: Float[Array, "S m b"]) -> Float[Array, "S b b"]:
        solver = _invert_slice(_dual_system(rows, damping))
        return _dual_inverse_slice(rows, jnp.einsum("smn,snb->smb", solver, rows, precision=_HIGHEST), damping)

    return _map_slices(invert, gradients)


def qr_saliency(
    weights: Float[Array, "N b"],
    gradients: Float[Array, "N m b"],
    damping: float | Float[Array, ""],
    score: ScoreFn | None = None,
) -> Float[Array, "N b"]:
    """The same scores by `qr_inverse`, for blocks whose estimated error is beyond `LARGEST_ERROR`."""

    def scored(weight_slice: Float[Array, "S b"], rows: Float[Array, "S m b"]) -> Float[Array, "S b"]:
        return (score or single_scores)(weight_slice, _qr_invert_slice(rows, damping))

    return _map_slices(scored, weights, gradients)


def qr_inverse(gradients: Float[Array, "N m b"], damping: float | Float[Array, ""]) -> Float[Array, "N b b"]:
    """F⁻¹ = R⁻¹ R⁻ᵀ from the triangular factor of [G/√m; √ζ I]; right in float32 where the other forms are not.

    The gradients are never squared. √ζ may be ten thousand times smaller than a gradient and yet decide the result,
    so the small rows must keep their digits: Householder reflections with the largest remaining column and, in it, the
    largest entry as pivot are stable row by row (Cox & Higham 1998). Plain XLA; some ten times the work of `inverse`.
    """
    return _map_slices(lambda rows: _qr_invert_slice(rows, damping), gradients)


def _qr_invert_slice(rows: Float[Array, "S m b"], damping: float | Float[Array, ""]) -> Float[Array, "S b b"]:
    num_slices, num_grads, size = rows.shape
    small = jnp.sqrt(jnp.asarray(damping, rows.dtype)) * jnp.eye(size, dtype=rows.dtype)
    stacked = [rows / jnp.sqrt(jnp.asarray(num_grads, rows.dtype)), jnp.broadcast_to(small, (num_slices, size, size))]
    # Blocks on the last axis, so that every step is a long vector operation; pivots differ between blocks, so rows and
    # columns are taken by sums with one-hot vectors.
    work = jnp.moveaxis(jnp.concatenate(stacked, axis=1), 0, -1)

    def one_hot(best: Int[Array, " S"], length: int) -> Float[Array, "n S"]:
        return (jnp.arange(length)[:, None] == best[None]).astype(rows.dtype)

    def reflect(j: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        # `work` has zeros in the rows that are done with and in the columns that had their turn.
        work, factor, pivots = carry
        norms = jnp.where(pivots.sum(axis=0) > 0, -1.0, jnp.sum(work**2, axis=0))
        column_of = one_hot(jnp.argmax(norms, axis=0), size)
        column = jnp.sum(work * column_of[None], axis=1)
        row_of = one_hot(jnp.argmax(jnp.abs(column), axis=0), num_grads + size)
        head = jnp.sum(column * row_of, axis=0)
        length = jnp.copysign(jnp.sqrt(jnp.sum(column**2, axis=0)), head)
        reflector = column + row_of * length[None]
        along = jnp.sum(reflector[:, None] * work, axis=0) / (length * (length + head))[None]
        pivot_row = jnp.sum(work * row_of[:, None], axis=0) - (head + length)[None] * along
        pivot_row = jnp.where(column_of > 0, -length[None], pivot_row)
        is_left = (1 - row_of)[:, None] * (1 - column_of)[None]
        work = (work - reflector[:, None] * along[None]) * is_left
        return work, factor.at[j].set(pivot_row), pivots.at[j].set(column_of)

    empty = jnp.zeros((size, size, num_slices), rows.dtype)
    _, factor, pivots = jax.lax.fori_loop(0, size, reflect, (work, empty, empty))

    def solve(step: Int[Array, ""], solved: Array) -> Array:
        # Rows of R⁻¹ whose columns were pivots later than this one are known, the others still zero.
        j = size - 1 - step
        rest = jnp.sum(factor[j][:, None] * solved, axis=0)
        unit = (jnp.arange(size) == j).astype(rows.dtype)[:, None]
        found = (unit - rest) / jnp.sum(factor[j] * pivots[j], axis=0)[None]
        return solved + pivots[j][:, None] * found[None]

    inverted = jnp.moveaxis(jax.lax.fori_loop(0, size, solve, empty), -1, 0)
    return jnp.einsum("sij,skj->sik", inverted, inverted, precision=_HIGHEST)


def form(num_grads: int, block_size: int) -> str:
    """'dual' where fewer gradients than a block has weights make the smaller systems, else 'gram'."""
    return "dual" if num_grads < block_size else "gram"


def dampened(
    grams: Float[Array, "N b b"], num_grads: int | Float[Array, ""], damping: float | Float[Array, ""]
) -> Float[Array, "N b b"]:
    """F = ζ I + G / m (Eq. 7) from the summed outer products of the m gradients that were really seen."""
    return grams / num_grads + damping * jnp.eye(grams.shape[-1], dtype=grams.dtype)[None]


def relative_damping(
    sum_of_squares: Float[Array, ""],
    num_grads: int | Float[Array, ""],
    factor: float | Float[Array, ""],
    num_weights: int,
) -> Float[Array, ""]:
    """ζ = factor · mean g² over a kernel's real weights; with all-zero gradients, a tiny positive number.

    Relative damping keeps every form of the inverse well conditioned and prunes better than a fixed small ζ.

    Args:
      sum_of_squares: Σ_i ‖g_i‖² of the kernel, the trace of its summed outer products.
    """
    mean_square = sum_of_squares / (num_grads * num_weights)
    return jnp.maximum(factor * mean_square, jnp.finfo(mean_square.dtype).tiny * 1e8)


def single_scores(weights: Float[Array, "N b"], inverses: Float[Array, "N b b"]) -> Float[Array, "N b"]:
    """ρ_Q for |Q| = 1: w_i² / (2 [F⁻¹]_ii).

    >>> import jax.numpy as jnp
    >>> single_scores(jnp.array([[2.0]]), jnp.array([[[4.0]]])).tolist()
    [[0.5]]
    """
    return weights**2 / (2 * jnp.diagonal(inverses, axis1=1, axis2=2))


def group_score(weights: Float[Array, " b"], inverse_block: Float[Array, "b b"], group: Any) -> Float[Array, ""]:
    """ρ_Q of one group Q of positions in one block: ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q (Eq. 11)."""
    group = jnp.asarray(group)
    chosen = weights[group]
    return 0.5 * chosen @ jnp.linalg.solve(inverse_block[jnp.ix_(group, group)], chosen)


def optimal_update(weights: Float[Array, " b"], inverse_block: Float[Array, "b b"], group: Any) -> Float[Array, " b"]:
    """Δθ* = −F⁻¹ E_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q (Eq. 10): zeroes w_Q and moves the block's other weights to their optimum."""
    group = jnp.asarray(group)
    solved = jnp.linalg.solve(inverse_block[jnp.ix_(group, group)], weights[group])
    return -inverse_block[:, group] @ solved
