"""Pruning for masks alone: the diagonal Fisher's cut, then exchanges of kept and pruned weights within blocks.

ρ_Q prices Q after the other weights have moved to their optimum. Under masks alone nothing moves, and what removing Q
costs at a minimum of the loss is ½ θ_Qᵀ F_QQ θ_Q. Weights whose effects cancel then go together for little, which
scores of single weights cannot see. In a block of consecutive inputs of one output unit the Fisher is estimated by

    F_ij = √(F_ii F_jj) · E[x_i x_j] / √(E[x_i²] E[x_j²]),

its diagonal from the gradients and its correlations from the inputs x of the kernel at all tokens: for a linear layer
∂L/∂θ_io = x_i δ_o, and the estimate holds where x and δ are independent. F is positive semi-definite.

Reference: Tan et al. 2024, Eq. 4 to 7; Martens & Grosse 2015 (K-FAC); Kwon et al. 2022 and Yu et al. 2022 (swaps).
Deviation: the first-order term −g_Qᵀ θ_Q is left out. Of a trained model it is noise of the few gradients, and larger
than the second-order term.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.core import sharding
from sparsecbm_jax.pruning.fisher import Piece
from sparsecbm_jax.pruning.gradients import ConceptMask, Kernels
from sparsecbm_jax.pruning.woodfisher import to_blocks
from sparsecbm_jax.pruning.woodfisher_scores import assemble

# Exchanges that are tried times the weights of a block, those of one cooling, and the temperature at its start, in
# units of the mean of H_ii: found on the quadratics of the tests, by brute force.
_WORK, _PERIOD, _HOTTEST = 12288, 32, 1.0

# Indices [S] → rows of H at them [S, b].
Rows = Callable[[Int[Array, " S"]], Float[Array, "S b"]]


class Swapped(NamedTuple):
    """Holds what exchanges came to.

    Attributes:
        mask: the new mask.
        before, after: Σ over blocks of ½ θ_Qᵀ F_QQ θ_Q, of the weights that this cut prunes.
    """

    mask: dict[str, Bool[Array, "..."]]
    before: float
    after: float


def swap(
    kernels: Kernels,
    scores: Kernels,
    products: Mapping[str, Float[Array, "*layers I b b"]],
    start: ConceptMask,
    cut: ConceptMask,
) -> Swapped:
    """Exchanges weights that `cut` prunes for others of their block, so that the blocks' loss increase is less.

    Every block keeps as many weights as before, and none loses more by the estimate than with `cut`.

    Args:
        kernels: θ_k.
        scores: ½ θ² F_ii, as `criteria.diagonal_fisher_scores` makes them.
        products: Σ x xᵀ over tokens of each block of b inputs.
        start: the mask before the cut; what it prunes stays pruned.
        cut: the mask after it.

    Raises:
        AssertionError: if kernels, scores and masks differ in paths or shapes.
    """
    chex.assert_trees_all_equal_shapes(dict(kernels), dict(scores), dict(start), dict(cut))
    mask, before, after = {}, 0.0, 0.0
    for path, kernel in kernels.items():
        mesh = sharding.mesh_of(kernel)
        pruned: dict[Piece, Array] = {}
        for layer in range(kernel.shape[0]) if kernel.ndim == 3 else (None,):
            piece = Piece(path, layer, 0, kernel.shape[-1])
            of_layer = products[path] if layer is None else products[path][layer]
            leaves = [piece.of(leaf[path], mesh) for leaf in (kernels, scores, start, cut)]
            pruned[piece], losses = sharding.in_turn(_swap_piece(*leaves, of_layer, mesh))
            old, new = sharding.to_host(losses)
            before, after = before + float(old), after + float(new)
        mask[path] = start[path] & (assemble(path, kernel, pruned)[0] < 0.5)
    return Swapped(mask, before, after)


@functools.partial(jax.jit, static_argnums=5)
def _swap_piece(
    kernel: Float[Array, "inputs U"],
    scores: Float[Array, "inputs U"],
    start: Bool[Array, "inputs U"],
    cut: Bool[Array, "inputs U"],
    products: Float[Array, "I b b"],
    mesh: Mesh | None,
) -> tuple[Float[Array, "I U b"], Float[Array, " 2"]]:
    """Returns which weights of some output units are pruned, 1 or 0, and the loss increase before and after."""
    size, units = products.shape[-1], kernel.shape[1]
    deviation = jnp.sqrt(jnp.diagonal(products, axis1=1, axis2=2))
    inverse = jnp.where(deviation > 0, 1 / jnp.where(deviation > 0, deviation, 1), 0)
    correlations = products * inverse[:, :, None] * inverse[:, None, :]

    def blocks(leaf: Array) -> Array:
        return to_blocks(leaf, size).reshape(-1, units, size)

    def of_row(row: tuple[Array, ...]) -> tuple[Array, Array]:
        effects, free, out, correlation = row

        def rows(index: Int[Array, " U"]) -> Float[Array, "U b"]:
            along = jnp.take_along_axis(effects, index[:, None], axis=1) * effects * correlation[index]
            return jnp.where(jnp.arange(size)[None] == index[:, None], effects**2, along)

        own = jnp.matmul(jnp.where(out, effects, 0), correlation, precision=jax.lax.Precision.HIGHEST)
        # The diagonal is the scores', also of an input that no token has.
        missing = 1 - jnp.diagonal(correlation)
        sums = effects * own + jnp.where(out, effects**2 * missing[None], 0)
        found, old, new = lowest(rows, effects**2, sums, out, free)
        return found.astype(jnp.float32), jnp.stack([jnp.sum(old), jnp.sum(new)])

    effects = jnp.sign(kernel) * jnp.sqrt(2 * scores)
    found, losses = jax.lax.map(of_row, (blocks(effects), blocks(start), blocks(start & ~cut), correlations))
    return found, jnp.sum(losses, axis=0)


def lowest(
    rows: Rows,
    diagonal: Float[Array, "S b"],
    sums: Float[Array, "S b"],
    pruned: Bool[Array, "S b"],
    free: Bool[Array, "S b"],
) -> tuple[Bool[Array, "S b"], Float[Array, " S"], Float[Array, " S"]]:
    """Looks for the set Q of lowest ½ 1_Qᵀ H 1_Q in each block, with H = F ∘ θθᵀ, of the size that it has.

    Simulated annealing: in each step one weight leaves Q and another enters, those by which the sum falls most but for
    noise that cools down again and again. The lowest of all sets that were met is returned.

    Args:
        rows: gives rows of H.
        diagonal: of H.
        sums: H 1_Q.
        pruned: Q at the start.
        free: what may be in Q.

    Returns:
        Q, and the sum at the start and in the end.

    Reference: Kirkpatrick et al. 1983 (simulated annealing).
    """
    size = diagonal.shape[1]
    at_start = 0.5 * jnp.sum(jnp.where(pruned, sums, 0), axis=1)

    # At first one descends from the start, in as many steps as move every weight once.
    num_tries = max(size, _WORK // size)
    # The same for all blocks, so that no device needs to know which it has.
    noise = jax.random.exponential(jax.random.key(0), (2, num_tries, size))
    scale = _HOTTEST * jnp.mean(diagonal, axis=1, keepdims=True)

    def exchange(step: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        current, sums, value, best, least = carry
        heat = jnp.where(step < size, 0, scale * (1 - (step % _PERIOD + 1) / _PERIOD))
        leaving = jnp.where(current & free, 0.5 * diagonal - sums, jnp.inf)
        first = jnp.argmin(leaving + heat * noise[0, step], axis=1)
        without = sums - rows(first)
        entering = jnp.where(~current & free, 0.5 * diagonal + without, jnp.inf)
        second = jnp.argmin(entering + heat * noise[1, step], axis=1)
        change = _at(leaving, first) + _at(entering, second)
        is_possible = jnp.isfinite(change)
        moved = (_one_hot(first, size) | _one_hot(second, size)) & is_possible[:, None]
        sums = jnp.where(is_possible[:, None], without + rows(second), sums)
        current = current ^ moved
        value = jnp.where(is_possible, value + change, value)
        # By more than what float32 makes of equal sums.
        is_better = value < least - 1e-6 * jnp.abs(at_start)
        best, least = jnp.where(is_better[:, None], current, best), jnp.where(is_better, value, least)
        return current, sums, value, best, least

    carry = (pruned, sums, at_start, pruned, at_start)
    *_, best, least = jax.lax.fori_loop(0, num_tries, exchange, carry)
    return best, at_start, least


def _at(leaf: Float[Array, "S b"], index: Int[Array, " S"]) -> Float[Array, " S"]:
    return jnp.take_along_axis(leaf, index[:, None], axis=1)[:, 0]


def _one_hot(index: Int[Array, " S"], size: int) -> Bool[Array, "S b"]:
    return jnp.arange(size)[None] == index[:, None]
