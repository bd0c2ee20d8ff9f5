"""Pruning patterns: single weights, groups of consecutive inputs, whole blocks, N of M, and greedy OBS.

A pattern turns the weights and the inverse Fisher of blocks into one score a weight. Weights that go together share
their score: ρ_Q / |Q|, the loss increase a weight, so that groups of all sizes compete on what they cost.

Reference: Tan et al. 2024, Eq. 11; Kurtic et al. 2022 (groups of 4 and N:M); Frantar & Alistarh 2022 (greedy OBS).
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsecbm_jax.pruning import cholesky, woodfisher

SINGLE = "1"


class Unit(NamedTuple):
    """Says what a pattern prunes at once.

    Attributes:
        group: consecutive inputs of an output unit that a decision is about.
        pruned: how many of them go.
    """

    group: int
    pruned: int


SINGLE_WEIGHT = Unit(1, 1)


def unit_of(pattern: str, block_size: int) -> Unit:
    """Returns the unit of one of `config.PATTERNS`.

    Raises:
        ValueError: if a group does not divide a block.
    """
    if pattern in (SINGLE, "greedy"):
        return SINGLE_WEIGHT
    pruned, _, group = pattern.partition(":")
    size = block_size if pattern == "block" else int(group or pruned)
    if block_size % size:
        raise ValueError(f"pattern {pattern!r} groups {size} inputs, which do not divide blocks of {block_size}")
    return Unit(size, int(pruned) if group else size)


def scores_of(pattern: str, block_size: int) -> Callable[[Float[Array, "S b"], Float[Array, "S b b"]], Array]:
    """Returns the function (weights, inverse Fisher) → scores of a pattern; see `unit_of` for the errors."""
    unit = unit_of(pattern, block_size)
    if pattern == "greedy":
        return greedy_scores
    if unit.pruned < unit.group:
        return lambda weights, inverses: n_of_m_scores(weights, inverses, unit)
    if unit.group > 1:
        return lambda weights, inverses: group_scores(weights, inverses, unit.group)
    return woodfisher.single_scores


def group_scores(weights: Float[Array, "S b"], inverses: Float[Array, "S b b"], size: int) -> Float[Array, "S b"]:
    """Computes ρ_Q / |Q| of every group of `size` consecutive weights of a block, at each of its weights."""
    num, block = weights.shape
    grouped = weights.reshape(num * (block // size), size)
    corners = [inverses[:, i : i + size, i : i + size] for i in range(0, block, size)]
    schur = cholesky.inverse(jnp.stack(corners, axis=1).reshape(-1, size, size))
    losses = 0.5 * jnp.einsum("ni,nij,nj->n", grouped, schur, grouped, precision=jax.lax.Precision.HIGHEST)
    return jnp.repeat(losses / size, size).reshape(num, block)


def n_of_m_scores(weights: Float[Array, "S b"], inverses: Float[Array, "S b b"], unit: Unit) -> Float[Array, "S b"]:
    """Computes ρ_Q / |Q| of the cheapest Q of `unit.pruned` weights of every group; the others score infinity."""
    num, block = weights.shape
    sets = list(itertools.combinations(range(unit.group), unit.pruned))
    losses = []
    for start in range(0, block, unit.group):
        for chosen in sets:
            at = jnp.asarray([start + i for i in chosen])
            schur = cholesky.inverse(inverses[:, at[:, None], at[None, :]])
            losses.append(0.5 * jnp.einsum("si,sij,sj->s", weights[:, at], schur, weights[:, at]))
    table = jnp.stack(losses, axis=1).reshape(num, block // unit.group, len(sets))
    member = jnp.asarray([[i in chosen for i in range(unit.group)] for chosen in sets])[jnp.argmin(table, axis=-1)]
    shared = jnp.min(table, axis=-1)[..., None] / unit.pruned
    return jnp.where(member, shared, jnp.inf).reshape(num, block)


def greedy_scores(weights: Float[Array, "S b"], inverses: Float[Array, "S b b"]) -> Float[Array, "S b"]:
    """Computes loss increases of removing a block's weights one by one, the cheapest first; the others move (OBS).

    A weight scores at least what those removed before it did, so that whatever is selected is what greedy OBS removes.
    """
    size = weights.shape[1]

    def remove(_: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        # Blocks on the last axis; a removed weight's row and column of the inverse are zero.
        values, inverse, scores, highest = carry
        diagonal = jnp.moveaxis(jnp.diagonal(inverse), -1, 0)
        is_left = diagonal > 0
        losses = jnp.where(is_left, values**2 / (2 * jnp.where(is_left, diagonal, 1)), jnp.inf)
        one_hot = (jnp.arange(size)[:, None] == jnp.argmin(losses, axis=0)[None]).astype(values.dtype)
        column = jnp.sum(inverse * one_hot[None], axis=1)
        pivot = jnp.sum(column * one_hot, axis=0)
        highest = jnp.maximum(highest, jnp.min(losses, axis=0))
        values = (values - column * (jnp.sum(values * one_hot, axis=0) / pivot)[None]) * (1 - one_hot)
        left = (1 - one_hot)[:, None] * (1 - one_hot)[None]
        inverse = (inverse - column[:, None] * (column / pivot[None])[None]) * left
        return values, inverse, scores + one_hot * highest[None], highest

    start = (weights.T, jnp.moveaxis(inverses, 0, -1), jnp.zeros_like(weights.T), jnp.zeros_like(weights[:, 0]))
    return jax.lax.fori_loop(0, size, remove, start)[2].T


def spread(
    scores: Mapping[str, Float[Array, "*batch inputs outputs"]], unit: Unit
) -> dict[str, Float[Array, "*batch inputs outputs"]]:
    """Turns scores of single weights to those of units: the mean of a group, or of its lowest N of M.

    Raises:
        ValueError: naming the kernel, if its inputs do not divide into groups.
    """
    return {path: _spread(path, leaf, unit) for path, leaf in scores.items()}


def _spread(path: str, scores: Float[Array, "..."], unit: Unit) -> Float[Array, "..."]:
    if unit.group == 1:
        return scores
    grouped = to_groups(path, scores, unit.group)
    rank = jnp.argsort(jnp.argsort(grouped, axis=-2), axis=-2)
    chosen = rank < unit.pruned
    mean = jnp.sum(jnp.where(chosen, grouped, 0), axis=-2, keepdims=True) / unit.pruned
    return jnp.where(chosen, mean, jnp.inf).reshape(scores.shape)


def to_groups(path: str, leaf: Array, group: int) -> Array:
    """Reshapes [..., inputs, outputs] to [..., inputs / group, group, outputs].

    Raises:
        ValueError: naming the kernel, if its inputs do not divide into groups.
    """
    *batch, inputs, outputs = leaf.shape
    if inputs % group:
        raise ValueError(f"{path} has {inputs} inputs, which do not divide into groups of {group}")
    return leaf.reshape(*batch, inputs // group, group, outputs)
