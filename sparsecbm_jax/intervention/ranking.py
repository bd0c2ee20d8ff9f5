"""What a flip of a weight is worth: saliencies, costs of everything else, and the best pairs of flips."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.core.selection import select_smallest

# Added to the products of directions with themselves, as a share of their mean square.
_RIDGE = 1e-4


SaliencyFn = Callable[[Any, Any], Any]
"""(weights, gradient of the loss by the effective weights) -> score; the lowest are dropped, the highest grown."""


def signed(weight: Float[Array, "..."], grad: Float[Array, "..."]) -> Float[Array, "..."]:
    """First-order fall of the loss when a weight is grown, −G with G = ∂L/∂M = ∂L/∂θ_k ⊙ θ.

    Growing weight i changes the loss by about +G_i and dropping it by −G_i, so the score orders both: the kept weights
    with the lowest −G do the most harm, the pruned ones with the highest −G would help most.

    Deviation: the paper ranks by magnitude; the sign needs far fewer weights for the same correction.
    """
    return -grad * weight


class EditCosts(NamedTuple):
    """What an edit of one concept's mask costs everything else that the concept is read from.

    Attributes:
        costs: {path: positive numbers}, squared and to be compared within a concept, such as a Fisher diagonal by the
            effective weights. Gains are divided by their root.
        directions: {path: [P, ...]}, gradients by the effective weights of P quantities that an edit is to leave where
            they are, to first order; None for none.
    """

    costs: Mapping[str, Float[Array, "..."]]
    directions: Mapping[str, Float[Array, "P ..."]] | None = None


def cost_aware(
    weight: Float[Array, "..."], grad: Float[Array, "..."], cost: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The signed fall of the loss over the root of what a change costs everything else, −G / (|θ| √cost).

    Flipping a weight moves it by |θ|, which costs |θ|² · cost / 2 to second order: the weight's size cancels.
    """
    return -grad * jnp.sign(weight) / jnp.sqrt(cost)


def project_out(grads: Mapping[str, Float[Array, "..."]], costs: EditCosts) -> dict[str, Float[Array, "..."]]:
    r"""Removes from a gradient what would move the quantities that are to stay.

    $g - \sum_p \lambda_p h_p$ with λ such that the step that follows it, weight by weight over its cost, is orthogonal
    to every direction h_p. Costs of single changes add up as squares only where their effects do not agree; along
    these directions they do.

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
    """The saliency as the paper prints it, S = |G ⊙ θ| with the mask's gradient G = ∂L/∂M = ∂L/∂θ_k ⊙ θ.

    Read to the letter, θ enters twice: once through the gradient of the mask, once as the printed factor.

    Reference: Tan et al. 2024, 'Sparsity-based Inference-time intervention', S = ||G_k(x) · θ*||.
    """
    return jnp.abs(grad * weight * weight)


SALIENCIES: Mapping[str, SaliencyFn] = {"signed": signed, "magnitude": magnitude}


def find_saliency(saliency: str | SaliencyFn) -> SaliencyFn:
    """The saliency of a name, or the function itself.

    Raises:
        ValueError: if there is none of that name.
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
        """The positions of the kernel among the first n; the others lie outside of it."""
        index = self.positions[path]
        return (jnp.where(self.places[path] < n, index[0], self.shapes[path]), *index[1:])


def ranked(scores: Mapping[str, Float[Array, "..."]], among: Mapping[str, Bool[Array, "..."]], size: int) -> Ranked:
    """The `size` lowest scores of a tree, ranked; ties by index, in the order of `selection.select_smallest`."""
    chosen = select_smallest(dict(scores), size, dict(among))
    positions = {path: positions_of_true(flags, size) for path, flags in chosen.items()}
    values = [scores[path].at[index].get(mode="fill", fill_value=jnp.inf) for path, index in positions.items()]
    is_real = [index[0] < scores[path].shape[0] for path, index in positions.items()]
    # What only fills the lists up comes last, also after scores that are infinite.
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
    """Kept weights to drop and pruned ones to grow, first those by which a loss falls most, from its gradients."""
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
    """Effective kernels without the first n of `dropped` and with the weights of the first n of `grown`."""
    new = {}
    for path, kernel in kernels.items():
        without = kernel.at[dropped.first(path, n)].set(0, mode="drop")
        at = grown.first(path, n)
        new[path] = without.at[at].set(weights[path].at[at].get(mode="fill", fill_value=0), mode="drop")
    return new


def swapped_mask(
    mask: Mapping[str, Bool[Array, "..."]], dropped: Ranked, grown: Ranked, n: Int[Array, ""]
) -> dict[str, Bool[Array, "..."]]:
    """The mask of `swapped` kernels."""
    return {
        path: kept.at[dropped.first(path, n)].set(False, mode="drop").at[grown.first(path, n)].set(True, mode="drop")
        for path, kept in mask.items()
    }


def positions_of_true(flags: Bool[Array, "..."], size: int) -> tuple[Int[Array, " {size}"], ...]:
    """Where the first `size` of the booleans are True, an index for each dimension; the rest lies outside.

    Counts by row and looks into the rows that have any: `jnp.nonzero` numbers every element, which takes far longer.

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
