"""Rankings of the flips of weights: saliencies, costs for other texts, and the best pairs of flips."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.core.selection import select_smallest

# Added to the diagonal of the directions' products, as a share of their mean square.
_RIDGE = 1e-4


SaliencyFn = Callable[[Any, Any], Any]
"""(weights, gradient of the loss by the effective weights) -> score; the lowest are dropped, the highest grown."""


def signed(weight: Float[Array, "..."], grad: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes the first-order fall of the loss when a weight is grown, −G with G = ∂L/∂M = ∂L/∂θ_k ⊙ θ.

    Growing weight i changes the loss by about +G_i and dropping it by −G_i, so one score orders both: the kept weights
    of lowest −G raise the loss most, and the pruned ones of highest −G would lower it most.

    Deviation: the paper ranks by magnitude; the sign needs far fewer weights for the same correction.
    """
    return -grad * weight


class EditCosts(NamedTuple):
    """The costs of an edit of one concept's mask for other texts.

    Attributes:
        costs: {path: positive numbers}, such as a Fisher diagonal by the effective weights, comparable within a
            concept. Gains are divided by their square roots.
        directions: {path: [P, ...]}, gradients by the effective weights of P quantities that an edit must not change to
            first order; None for none.
    """

    costs: Mapping[str, Float[Array, "..."]]
    directions: Mapping[str, Float[Array, "P ..."]] | None = None


def cost_aware(
    weight: Float[Array, "..."], grad: Float[Array, "..."], cost: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Computes the signed fall of the loss over the root of the cost of a change for other texts, −G / (|θ| √cost).

    Flipping a weight moves it by |θ|, which costs |θ|² · cost / 2 to second order: the weight's size cancels.
    """
    return -grad * jnp.sign(weight) / jnp.sqrt(cost)


def project_out(grads: Mapping[str, Float[Array, "..."]], costs: EditCosts) -> dict[str, Float[Array, "..."]]:
    """Projects a gradient so that a step along it does not change the protected quantities to first order.

    The result is g − Σ_p λ_p h_p. λ is such that the step along it, with each weight divided by its cost, is orthogonal
    to every direction h_p. This complements costs: costs of single changes add up as squares only if their effects are
    independent, and along these directions the effects agree.

    Reference: after A-GEM (Chaudhry et al. 2019), which projects by one direction and without costs.
    """
    if costs.directions is None:
        return dict(grads)
    products, against = jnp.float32(0), jnp.float32(0)
    for path, own in costs.directions.items():
        axes = tuple(range(1, own.ndim))
        weighted = own / costs.costs[path]
        with jax.default_matmul_precision("highest"):
            products += jnp.tensordot(weighted, own, axes=(axes, axes))
            against += jnp.tensordot(weighted, grads[path], axes=(axes, tuple(range(grads[path].ndim))))
    # Directions may depend on each other; those of a class that no text has are zero.
    ridge = _RIDGE * jnp.trace(products) / products.shape[0] + jnp.finfo(products.dtype).tiny
    amounts = jnp.linalg.solve(products + ridge * jnp.eye(products.shape[0]), against)
    return {path: grad - jnp.tensordot(amounts, costs.directions[path], axes=1) for path, grad in grads.items()}


def magnitude(weight: Float[Array, "..."], grad: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes the paper's saliency as printed, S = |G ⊙ θ| with the mask's gradient G = ∂L/∂M = ∂L/∂θ_k ⊙ θ.

    In this literal form θ enters twice: through the gradient of the mask, and as the printed factor.

    Reference: Tan et al. 2024, 'Sparsity-based Inference-time intervention', S = ||G_k(x) · θ*||.
    """
    return jnp.abs(grad * weight * weight)


SALIENCIES: Mapping[str, SaliencyFn] = {"signed": signed, "magnitude": magnitude}


def find_saliency(saliency: str | SaliencyFn) -> SaliencyFn:
    """Returns the saliency of a name, or the function itself.

    Raises:
        ValueError: There is none of that name.
    """
    if callable(saliency):
        return saliency
    if saliency not in SALIENCIES:
        raise ValueError(f"saliency is {saliency!r}; expected one of {', '.join(map(repr, SALIENCIES))} or a function")
    return SALIENCIES[saliency]


class Ranked(NamedTuple):
    """Chosen positions of each kernel, an index for each dimension, and their places in the ranking of all."""

    positions: dict[str, tuple[Int[Array, " P"], ...]]
    places: dict[str, Int[Array, " P"]]
    shapes: dict[str, int]
    num: Int[Array, ""]

    def first(self, path: str, n: Int[Array, ""]) -> tuple[Int[Array, " P"], ...]:
        """Returns the positions of the kernel among the first n of all; the others lie outside of the kernel."""
        index = self.positions[path]
        return (jnp.where(self.places[path] < n, index[0], self.shapes[path]), *index[1:])


def ranked(scores: Mapping[str, Float[Array, "..."]], among: Mapping[str, Bool[Array, "..."]], size: int) -> Ranked:
    """Ranks the `size` lowest scores of a tree; ties go by index, as in `selection.select_smallest`.

    Args:
        scores: Scores by path.
        among: True at positions that may be ranked, by path.
        size: Most positions to rank.
    """
    chosen = select_smallest(dict(scores), size, dict(among))
    positions = {path: positions_of_true(flags, size) for path, flags in chosen.items()}
    values = [scores[path].at[index].get(mode="fill", fill_value=jnp.inf) for path, index in positions.items()]
    is_real = [index[0] < scores[path].shape[0] for path, index in positions.items()]
    # Entries that only fill the lists come last, also after infinite scores.
    order = jnp.lexsort((jnp.concatenate(values), ~jnp.concatenate(is_real)))
    places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    parts = dict(zip(positions, jnp.split(places, len(positions)), strict=True))
    shapes = {path: scores[path].shape[0] for path in positions}
    return Ranked(positions, parts, shapes, sum((jnp.sum(real, dtype=jnp.int32) for real in is_real), jnp.int32(0)))


def ranked_swaps(
    weights: Mapping[str, Float[Array, "..."]],
    mask: Mapping[str, Bool[Array, "..."]],
    grads: Mapping[str, Float[Array, "..."]],
    costs: EditCosts | None,
    size: int,
) -> tuple[Ranked, Ranked]:
    """Ranks kept weights to drop and pruned ones to grow, first those that lower a loss most.

    Args:
        weights: θ by path.
        mask: The concept's mask.
        grads: Gradient of the loss by the effective weights.
        costs: Costs of a change for other texts; None counts every weight alike.
        size: Most weights of each ranking.

    Returns:
        The ranking of weights to drop, and that of weights to grow.
    """
    if costs is None:
        gains = {path: signed(weights[path], grads[path]) for path in mask}
    else:
        spared = project_out(grads, costs)
        gains = {path: cost_aware(weights[path], spared[path], costs.costs[path]) for path in mask}
    pruned = {path: ~kept for path, kept in mask.items()}
    return ranked(gains, mask, size), ranked({path: -gain for path, gain in gains.items()}, pruned, size)


def swapped(
    kernels: Mapping[str, Float[Array, "..."]],
    weights: Mapping[str, Float[Array, "..."]],
    dropped: Ranked,
    grown: Ranked,
    n: Int[Array, ""],
) -> dict[str, Float[Array, "..."]]:
    """Returns effective kernels without the first n of `dropped` and with the weights of the first n of `grown`."""
    new = {}
    for path, kernel in kernels.items():
        without = kernel.at[dropped.first(path, n)].set(0, mode="drop")
        at = grown.first(path, n)
        new[path] = without.at[at].set(weights[path].at[at].get(mode="fill", fill_value=0), mode="drop")
    return new


def swapped_mask(
    mask: Mapping[str, Bool[Array, "..."]], dropped: Ranked, grown: Ranked, n: Int[Array, ""]
) -> dict[str, Bool[Array, "..."]]:
    """Returns the mask of `swapped` kernels."""
    return {
        path: kept.at[dropped.first(path, n)].set(False, mode="drop").at[grown.first(path, n)].set(True, mode="drop")
        for path, kept in mask.items()
    }


def positions_of_true(flags: Bool[Array, "..."], size: int) -> tuple[Int[Array, " {size}"], ...]:
    """Finds the first `size` True elements, an index for each dimension; indices of absent ones lie outside.

    It counts by row and searches only the rows that have any: `jnp.nonzero` numbers every element, which takes far
    longer.

    >>> import jax.numpy as jnp
    >>> [index.tolist() for index in positions_of_true(jnp.array([[False, True], [True, False]]), 3)]
    [[0, 1, 2], [1, 0, 0]]
    """
    *leading, width = flags.shape
    rows = flags.reshape(-1, width)
    ends = jnp.cumsum(jnp.sum(rows, axis=1, dtype=jnp.int32))
    number = jnp.arange(size, dtype=jnp.int32)
    row = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
    is_there = row < len(ends)
    safe = jnp.minimum(row, len(ends) - 1)
    before = jnp.where(safe > 0, ends[safe - 1], 0)
    seen = jnp.cumsum(rows[safe], axis=1, dtype=jnp.int32)
    column = jnp.sum(seen <= (number - before)[:, None], axis=1, dtype=jnp.int32)
    first, *others = jnp.unravel_index(safe, tuple(leading)) if leading else (jnp.zeros_like(safe),)
    if not leading:
        return (jnp.where(is_there, column, width),)
    inside = [jnp.where(is_there, index, 0) for index in (*others, column)]
    return (jnp.where(is_there, first, leading[0]), *inside)
