"""Block-wise WoodFisher: the empirical Fisher of a kernel, its inverse, the pruning score ρ_Q and the optimal update.

Pure array maths that knows no model and no data. A kernel is seen as N blocks of b weights; the Fisher is

    F = ζ I + (1/m) Σ_i g_i g_iᵀ,  block-diagonal,                                   (Eq. 7)

and the loss increase of removing the weights Q of one block, the others moving to their optimum, is

    ρ_Q = ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q.                                                   (Eq. 11)

Reference: Tan et al. 2024, Appendix C; Kurtic et al. 2022 (oBERT).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Blocks inverted at a time: at b = 64 in float32 a megabyte, which stays in a core's cache.
SLICE = 64
_HIGHEST = jax.lax.Precision.HIGHEST


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
) -> Float[Array, "N b"]:
    """ρ_Q of every single weight, straight from the summed outer products; inverses live for one slice only.

    Args:
      weights: θ_k in blocks.
      grams: Σ_i g_i g_iᵀ in blocks.
      num_grads: m, the gradients really seen.
      damping: ζ, absolute; see `relative_damping`.
    """

    def score(weight_slice: Float[Array, "S b"], gram_slice: Float[Array, "S b b"]) -> Float[Array, "S b"]:
        return single_scores(weight_slice, _invert_slice(dampened(gram_slice, num_grads, damping)))

    return _map_slices(score, weights, grams)


def dual_saliency(
    weights: Float[Array, "N b"], gradients: Float[Array, "N m b"], damping: float | Float[Array, ""]
) -> Float[Array, "N b"]:
    """The same scores from the gradients themselves: m × m systems instead of b × b, for m < b.

    With G the m gradients of a block as rows, F⁻¹ = (I − Gᵀ (m ζ I + G Gᵀ)⁻¹ G) / ζ (Woodbury), of which only the
    diagonal is needed. Where a weight's mean g² is thousands of times ζ, float32 loses it in the difference; it is
    never below 1 / F_ii.
    """
    num_grads = gradients.shape[1]

    def score(weight_slice: Float[Array, "S b"], rows: Float[Array, "S m b"]) -> Float[Array, "S b"]:
        outer = jnp.einsum("smb,snb->smn", rows, rows, precision=_HIGHEST)
        system = outer + num_grads * damping * jnp.eye(num_grads, dtype=rows.dtype)[None]
        solved = jnp.einsum("smn,snb->smb", _invert_slice(system), rows, precision=_HIGHEST)
        diagonal = (1 - jnp.sum(rows * solved, axis=1)) / damping
        diagonal = jnp.maximum(diagonal, 1 / (damping + jnp.mean(rows**2, axis=1)))
        return weight_slice**2 / (2 * diagonal)

    return _map_slices(score, weights, gradients)


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
