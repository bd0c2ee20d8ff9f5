"""Block-wise WoodFisher: the empirical Fisher of a kernel, its inverse, the pruning score ρ_Q and the optimal update.

Pure array maths that knows no model and no data. A kernel is seen as N blocks of b weights; the Fisher is

    F = ζ I + (1/m) Σ_i g_i g_iᵀ,  block-diagonal,                                   (Eq. 7)

and the loss increase of removing the weights Q of one block, the others moving to their optimum, is

    ρ_Q = ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q.                                                   (Eq. 11)

Three forms of F⁻¹, which agree wherever float32 allows all three:

    gram   sums outer products (4 b bytes a weight, whatever m) and factors b × b blocks;
    dual   keeps the gradients (4 m bytes a weight) and factors m × m systems: for m < b;
    qr     triangularises [G/√m; √ζ I], never squaring the gradients: for blocks whose Fisher float32 cannot invert.

Reference: Tan et al. 2024, Appendix C; Kurtic et al. 2022 (oBERT).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.pruning import cholesky

# Output units whose gradients are brought into blocks at a time on CPU: a cache line of each row.
_TILE = 16
# The relative error of diag F⁻¹ is at most so many times the condition that a form sees (`saliency`, `dual_saliency`),
# and beyond LARGEST_ERROR a block is not to be trusted: found by experiment over gradients of rms 1e-6 to 1,
# independent and of rank 5, at ζ = 1e-7, with m from 20 to 1024, and over those of a fine-tuned MiniLM.
GRAM_ERROR, DUAL_ERROR, LARGEST_ERROR = 1.5e-6, 4e-7, 1e-3

# (weights [S, b], inverse Fisher [S, b, b]) → scores [S, b]
ScoreFn = Callable[[Float[Array, "S b"], Float[Array, "S b b"]], Float[Array, "S b"]]


def to_blocks(kernel: Float[Array, "*batch inputs outputs"], block_size: int) -> Float[Array, "N b"]:
    """Views a kernel as blocks of `block_size` consecutive inputs of one output unit.

    A Flax kernel is (inputs, outputs); PyTorch tools get the same blocks by flattening (outputs, inputs), in another
    order. The first block of inputs comes first, of all outputs, so that blocks lie on a mesh as their kernel does.
    Inputs that do not fill the last block are padded with zeros; with zero gradients a padded weight is decoupled from
    the real ones and scores zero.

    >>> import jax.numpy as jnp
    >>> to_blocks(jnp.arange(6.0).reshape(3, 2), 2).tolist()
    [[0.0, 2.0], [1.0, 3.0], [4.0, 0.0], [5.0, 0.0]]
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    *batch, inputs, outputs = kernel.shape
    padding = -inputs % block_size
    if padding:
        kernel = jnp.pad(kernel, [(0, 0)] * len(batch) + [(0, padding), (0, 0)])
    rows = kernel.reshape(*batch, (inputs + padding) // block_size, block_size, outputs)
    return jnp.swapaxes(rows, -1, -2).reshape(-1, block_size)


def _tiles(
    leaves: Sequence[Float[Array, "inputs units"]], block_size: int
) -> tuple[int, int, Callable[[Int[Array, ""]], tuple[Int[Array, ""], Int[Array, ""], list[Float[Array, "b T"]]]]]:
    """Cuts matrices of one shape into tiles of one block of inputs and some units, small enough to stay in a cache.

    Returns:
        The number of tiles; the number T of units of a tile; and a function that gives of a tile the number of its
        first block, how many of its first units belong to the tile before it (since T need not divide them), and the
        tile of every leaf.
    """
    inputs, units = leaves[0].shape
    width = min(_TILE if cholesky.is_for_cpu() else cholesky.WIDE_SLICE, units)
    per_row, padding = -(-units // width), -inputs % block_size
    padded = [jnp.pad(leaf, ((0, padding), (0, 0))) for leaf in leaves] if padding else leaves

    def cut(number: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""], list[Float[Array, "b T"]]]:
        row, wanted = number // per_row, number % per_row * width
        first = jnp.minimum(wanted, units - width)
        tile = [jax.lax.dynamic_slice(leaf, (row * block_size, first), (block_size, width)) for leaf in padded]
        return row * units + first, wanted - first, tile

    return (inputs + padding) // block_size * per_row, width, cut


def _rows(tile: Sequence[Float[Array, "b T"]]) -> Float[Array, "T m b"]:
    """Brings the gradients of a tile's blocks together before it turns them."""
    return jnp.transpose(jax.lax.optimization_barrier(jnp.stack(tile)), (2, 0, 1))


def add_gram(total: Float[Array, "N b b"], gradients: Sequence[Float[Array, "inputs units"]]) -> Float[Array, "N b b"]:
    """Adds Σ_i g_i g_iᵀ over some gradients of a kernel to `total`, block by block in the order of `to_blocks`."""
    size = total.shape[-1]
    count, width, cut = _tiles(gradients, size)

    def add(number: Int[Array, ""], total: Float[Array, "N b b"]) -> Float[Array, "N b b"]:
        first, done, tile = cut(number)
        rows = _rows(tile)
        rows = jnp.where((jnp.arange(width) >= done)[:, None, None], rows, 0)
        before = jax.lax.dynamic_slice(total, (first, 0, 0), (width, size, size))
        return jax.lax.dynamic_update_slice(total, before + gram(rows), (first, 0, 0))

    return jax.lax.fori_loop(0, count, add, total)


def gram(gradients: Float[Array, "N u b"]) -> Float[Array, "N b b"]:
    """Sums the outer products g_i g_iᵀ of every block over u gradients.

    >>> import jax.numpy as jnp
    >>> gram(jnp.array([[[1.0, 2.0], [0.0, 1.0]]]))[0].tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    return cholesky.product("nub,nuc->nbc", gradients, gradients)


def saliency(
    weights: Float[Array, "N b"],
    grams: Float[Array, "N b b"],
    num_grads: int | Float[Array, ""],
    damping: float | Float[Array, ""],
    score: ScoreFn | None = None,
) -> tuple[Float[Array, "N b"], Float[Array, " N"]]:
    """Computes ρ_Q of every weight, straight from the summed outer products; inverses live for one slice only.

    Args:
        weights: θ_k in blocks.
        grams: Σ_i g_i g_iᵀ in blocks.
        num_grads: m, the gradients really seen.
        damping: ζ, absolute; see `relative_damping`.
        score: turns weights and inverses to scores of groups; by default weights are scored one by one, by
            `single_score`.

    Returns:
        The scores, and an estimate of the relative error of each block's diag F⁻¹, from max_i F_ii [F⁻¹]_ii.
    """

    def scored(weight_slice: Float[Array, "S b"], gram_slice: Float[Array, "S b b"]) -> Float[Array, "S b+1"]:
        fisher = dampened(gram_slice, num_grads, damping)
        if score is None:
            of_inverse = cholesky.inverse_diagonal(fisher)
            scores = single_score(weight_slice, of_inverse)
        else:
            inverses = cholesky.invert(fisher)
            of_inverse, scores = jnp.diagonal(inverses, axis1=1, axis2=2), score(weight_slice, inverses)
        return _beside(scores, _gram_error(fisher, of_inverse))

    return _apart(cholesky.map_slices(scored, weights, grams))


def _gram_error(fisher: Float[Array, "S b b"], of_inverse: Float[Array, "S b"]) -> Float[Array, " S"]:
    condition = jnp.max(jnp.diagonal(fisher, axis1=1, axis2=2) * of_inverse, axis=1)
    return _error(of_inverse, GRAM_ERROR * condition)


def _error(diagonal: Float[Array, "S b"], estimate: Float[Array, " S"]) -> Float[Array, " S"]:
    """Returns the estimate, or infinity where an inverse has come out as none can be."""
    return jnp.where((diagonal > 0).all(axis=1) & jnp.isfinite(estimate), estimate, jnp.inf)


def _beside(scores: Float[Array, "S b"], error: Float[Array, " S"]) -> Float[Array, "S b+1"]:
    return jnp.concatenate([scores, error[:, None]], axis=1)


def _apart(both: Float[Array, "N b+1"]) -> tuple[Float[Array, "N b"], Float[Array, " N"]]:
    return both[:, :-1], both[:, -1]


def dual_saliency(
    kernel: Float[Array, "inputs units"],
    gradients: Sequence[Float[Array, "inputs units"]],
    damping: float | Float[Array, ""],
    block_size: int,
    score: ScoreFn | None = None,
) -> tuple[Float[Array, "N b"], Float[Array, " N"]]:
    """Computes the same from the gradients themselves: m × m systems instead of b × b, for m < b.

    With G the m gradients of a block as rows and m ζ I + G Gᵀ = L Lᵀ, F⁻¹ = (I − (L⁻¹ G)ᵀ L⁻¹ G) / ζ (Woodbury), of
    which single weights need the diagonal only. What the difference loses is part of the estimated error.

    Args:
        kernel: θ_k, or some of its output units.
        gradients: the m gradients.
        damping: ζ, absolute.
        block_size: b.
        score: as in `saliency`.

    Returns:
        As `saliency`.
    """
    units = kernel.shape[1]
    count, width, cut = _tiles([kernel, *gradients], block_size)

    def scored(number: Int[Array, ""]) -> Float[Array, "T b+1"]:
        _, _, (weights, *tile) = cut(number)
        rows, weights = _rows(tile), weights.T
        system = _dual_system(rows, damping)
        root = cholesky.root(system)
        solved = cholesky.product("smn,snb->smb", root, rows)
        left = 1 - jnp.sum(solved**2, axis=1)
        spread = jnp.diagonal(system, axis1=1, axis2=2) * jnp.sum(root**2, axis=1)
        error = _error(left, DUAL_ERROR * jnp.max(spread, axis=1) / jnp.min(left, axis=1))
        if score is None:
            return _beside(single_score(weights, left / damping), error)
        return _beside(score(weights, _dual_inverse_slice(solved, damping)), error)

    mapped = jax.lax.map(scored, jnp.arange(count))
    by_row = mapped.reshape(-1, -(-units // width), width, mapped.shape[-1])
    # The last tile of a row of blocks begins where it still is a whole one.
    whole = by_row[:, :-1].reshape(by_row.shape[0], -1, mapped.shape[-1])
    rest = by_row[:, -1, by_row.shape[1] * width - units :]
    return _apart(jnp.concatenate([whole, rest], axis=1).reshape(-1, mapped.shape[-1]))


def _dual_system(rows: Float[Array, "S m b"], damping: float | Float[Array, ""]) -> Float[Array, "S m m"]:
    """Computes m ζ I + G Gᵀ."""
    outer = cholesky.product("smb,snb->smn", rows, rows)
    return outer + rows.shape[1] * damping * jnp.eye(rows.shape[1], dtype=rows.dtype)[None]


def _dual_inverse_slice(solved: Float[Array, "S m b"], damping: float | Float[Array, ""]) -> Float[Array, "S b b"]:
    """Computes F⁻¹ from L⁻¹ G."""
    projected = cholesky.product("smb,smc->sbc", solved, solved)
    return (jnp.eye(solved.shape[-1], dtype=solved.dtype)[None] - projected) / damping


def qr_saliency(
    weights: Float[Array, "N b"],
    gradients: Float[Array, "N m b"],
    damping: float | Float[Array, ""],
    score: ScoreFn | None = None,
) -> Float[Array, "N b"]:
    """Computes the same scores by QR, for blocks whose estimated error is beyond `LARGEST_ERROR`.

    F⁻¹ = R⁻¹ R⁻ᵀ with the triangular factor R of [G/√m; √ζ I], right in float32 where the other forms are not: the
    gradients are never squared. √ζ may be ten thousand times smaller than a gradient and yet decide the result, so the
    small rows must keep their digits: Householder reflections with the largest remaining column and, in it, the largest
    entry as pivot are stable row by row (Cox & Higham 1998). Plain XLA; some ten times the work of the others.

    Args:
        weights: θ_k in blocks.
        gradients: the m gradients of every block.
        damping: ζ, absolute.
        score: as in `saliency`.
    """

    def scored(weight_slice: Float[Array, "S b"], rows: Float[Array, "S m b"]) -> Float[Array, "S b"]:
        return (score or single_scores)(weight_slice, _qr_invert_slice(rows, damping))

    return cholesky.map_slices(scored, weights, gradients)


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
    return cholesky.product("sij,skj->sik", inverted, inverted)


def form(num_grads: int, block_size: int) -> str:
    """Chooses 'dual' where fewer gradients than a block has weights make the smaller systems, else 'gram'."""
    return "dual" if num_grads < block_size else "gram"


def dampened(
    grams: Float[Array, "N b b"], num_grads: int | Float[Array, ""], damping: float | Float[Array, ""]
) -> Float[Array, "N b b"]:
    """Computes F = ζ I + G / m (Eq. 7) from the summed outer products of the m gradients that were really seen."""
    return grams / num_grads + damping * jnp.eye(grams.shape[-1], dtype=grams.dtype)[None]


def relative_damping(
    sum_of_squares: Float[Array, ""],
    num_grads: int | Float[Array, ""],
    factor: float | Float[Array, ""],
    num_weights: int,
) -> Float[Array, ""]:
    """Computes ζ = factor · mean g² over a kernel's real weights; with all-zero gradients, a tiny positive number.

    Relative damping keeps every form of the inverse well conditioned and prunes better than a fixed small ζ.

    Args:
        sum_of_squares: Σ_i ‖g_i‖² of the kernel, the trace of its summed outer products.
        num_grads: m.
        factor: ζ relative to mean g², such as 0.1.
        num_weights: weights of the kernel, padding not counted.
    """
    mean_square = sum_of_squares / float(num_grads * num_weights)  # may not fit 32 bits
    return jnp.maximum(factor * mean_square, jnp.finfo(mean_square.dtype).tiny * 1e8)


def single_score(weights: Float[Array, "N b"], of_inverse: Float[Array, "N b"]) -> Float[Array, "N b"]:
    """Computes ρ_Q for |Q| = 1: w_i² / (2 [F⁻¹]_ii). `pruning.patterns` has ρ_Q of groups.

    Args:
        weights: w in blocks.
        of_inverse: the diagonals of the blocks' F⁻¹.

    Reference: Tan et al. 2024, Eq. 11.

    >>> import jax.numpy as jnp
    >>> single_score(jnp.array([[2.0]]), jnp.array([[4.0]])).tolist()
    [[0.5]]
    """
    return weights**2 / (2 * of_inverse)


def single_scores(weights: Float[Array, "N b"], inverses: Float[Array, "N b b"]) -> Float[Array, "N b"]:
    """Computes `single_score` from whole inverses."""
    return single_score(weights, jnp.diagonal(inverses, axis1=1, axis2=2))


def joint_update(
    weights: Float[Array, "N b"],
    kept: Bool[Array, "N b"],
    grams: Float[Array, "N b b"],
    num_grads: int | Float[Array, ""],
    damping: float | Float[Array, ""],
) -> tuple[Float[Array, "N b"], Float[Array, " N"]]:
    """Sets Q, all that is not kept, to zero and the others to their optimum: Eq. 10 for any number of weights.

    With P the weights that stay, Eq. 10 is δ_P = F_PP⁻¹ F_PQ w_Q, which takes one inverse a block whatever Q is.

    Args:
        weights: θ_k in blocks.
        kept: which weights stay.
        grams: Σ_i g_i g_iᵀ in blocks.
        num_grads: m, the gradients really seen.
        damping: ζ, absolute.

    Returns:
        The blocks, and an estimate of each inverse's relative error, as in `saliency`.
    """

    def moved(weight: Float[Array, "S b"], stays: Bool[Array, "S b"], gram_slice: Float[Array, "S b b"]) -> Array:
        fisher = dampened(gram_slice, num_grads, damping)
        both = stays[:, :, None] & stays[:, None, :]
        alone = jnp.eye(weight.shape[1], dtype=weight.dtype)[None] * ~stays[:, None, :]
        remaining = jnp.where(both, fisher, 0) + alone
        inverses = cholesky.invert(remaining)
        error = _gram_error(remaining, jnp.diagonal(inverses, axis1=1, axis2=2))
        pull = jnp.where(stays, cholesky.product("sij,sj->si", fisher, jnp.where(stays, 0, weight)), 0)
        return _beside(jnp.where(stays, weight + cholesky.product("sij,sj->si", inverses, pull), 0), error)

    return _apart(cholesky.map_slices(moved, weights, kept, grams))
