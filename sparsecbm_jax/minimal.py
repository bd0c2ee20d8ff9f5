"""The smallest edit that repairs a concept: the counterfactual explanation of a prediction in terms of its subnetwork.

Weights are ranked once, by one gradient. How many of the ranking it takes is found by doubling and bisection, with the
subnetwork run at each trial: the effect need not grow with every weight, so the number that comes out is one that was
seen to repair, and the number below it one that was seen not to.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax import cbm
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.cbm import CBMConfig, CBMOutput
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.edits import MaskEdit
from sparsecbm_jax.intervention import Guard, check_index, check_masks, edit_between, guarded, signed, spare
from sparsecbm_jax.masks import AnyMasks, Params
from sparsecbm_jax.selection import select_smallest


class MinimalEdit(NamedTuple):
    """What the search found.

    Attributes:
      edit: nothing is dropped or grown where nothing repairs, or nothing need be.
      num_pairs: n, weights dropped and as many grown.
      is_repaired: whether all rows have their target with the margin now.
      margin: the least margin of a row after the edit, u_target − max of the others.
      margin_below: the same with n − 1 pairs, seen not to be above the asked one; NaN where n is 0.
      num_trials: how often the subnetwork was run for it.
    """

    edit: MaskEdit
    num_pairs: Int[Array, ""]
    is_repaired: Bool[Array, ""]
    margin: Float[Array, ""]
    margin_below: Float[Array, ""]
    num_trials: Int[Array, ""]


def minimal_edit(
    config: CBMConfig,
    params: Params,
    masks: AnyMasks,
    heads: Params,
    batch: Batch,
    concept: int | Int[Array, ""],
    target: int | Int[Array, ""] | Int[Array, " B"],
    *,
    margin: float | Float[Array, ""] = 0.0,
    guard: Guard | None = None,
    max_pairs: int = 4096,
) -> tuple[AnyMasks, MinimalEdit]:
    """Drops the n most harmful kept weights of concept k and grows the n most helpful pruned ones, n as small as does.

    Pure, and compiled once for all concepts, targets and margins of a batch shape. First-order gains, by which weights
    are ranked, are of the least margin; see `intervention.signed`.

    Args:
      config, params, masks, heads, batch, concept, target: as for `intervention.intervene`; padding rows do not count.
      margin: u_target is to be above the other classes' logits by more than this.
      guard: what a change costs everything else; see `Guard`. None counts every weight alike.
      max_pairs: the most pairs that are tried.

    Returns:
      The new masks and what was found; the same masks where `max_pairs` pairs do not repair.

    Raises:
      ValueError: as `intervene`; or `max_pairs` is not positive.
    """
    check_masks(masks)
    check_index("concept", concept, 0, config.num_concepts)
    check_index("target", target, 0, config.num_classes)
    if max_pairs < 1:
        raise ValueError(f"max_pairs is {max_pairs}; expected at least 1")
    return _minimal_edit(
        config,
        params,
        masks,
        heads,
        batch,
        jnp.asarray(concept, jnp.int32),
        jnp.broadcast_to(jnp.asarray(target, jnp.int32), (batch.input_ids.shape[0],)),
        jnp.asarray(margin, jnp.float32),
        guard,
        max_pairs=min(max_pairs, masks_lib.num_weights(masks)),
    )


@functools.partial(jax.jit, static_argnames=("config", "max_pairs"))
def _minimal_edit(
    config: CBMConfig,
    params: Params,
    masks: AnyMasks,
    heads: Params,
    batch: Batch,
    concept: Int[Array, ""],
    target: Int[Array, " B"],
    wanted: Float[Array, ""],
    guard: Guard | None,
    *,
    max_pairs: int,
) -> tuple[AnyMasks, MinimalEdit]:
    before = cbm.forward(config, params, masks, heads, batch)
    mask = masks_lib.concept(masks, concept)
    weights = {path: masks_lib.leaf_at(params, path) for path in mask}
    kernels = masks_lib.kernels_of(params, mask)

    def read(kernels: Mapping[str, Float[Array, "..."]]) -> tuple[Float[Array, ""], CBMOutput]:
        output = cbm.subnetwork_output(config, params, heads, batch, kernels, concept, before.activations)
        return least_margin(output.concept_logits[:, 0], target, batch.example_weight), output

    start, grads = jax.value_and_grad(read, has_aux=True)(kernels)
    # Negated: the margin is to rise.
    dropped, grown = ranked_swaps(weights, mask, {path: -grad for path, grad in grads.items()}, guard, max_pairs)
    most = jnp.minimum(dropped.num, grown.num)

    search = _smallest(lambda n: read(swapped(kernels, weights, dropped, grown, n)), start, wanted, most)
    count = jnp.where(search.is_found, search.high, 0)
    margin, after = jax.tree.map(
        lambda at_high, at_start: jnp.where(count > 0, at_high, at_start), search.at_high, start
    )
    new_mask = swapped_mask(mask, dropped, grown, count)
    no_label = jnp.full_like(target, -1)
    edit = edit_between(
        mask, new_mask, before, after, concept=concept, target=target, label=no_label, num_per_step=count
    )
    margin_below = jnp.where(count > 0, search.margin_at_low, jnp.nan)
    found = MinimalEdit(edit, count, search.is_found, margin, margin_below, search.num_trials)
    return masks_lib.replace_concept(masks, concept, new_mask), found


def least_margin(
    logits: Float[Array, "B C"], target: Int[Array, " B"], example_weight: Float[Array, " B"]
) -> Float[Array, ""]:
    """min over real rows of u_target − max_{c ≠ target} u_c.

    >>> import jax.numpy as jnp
    >>> float(least_margin(jnp.array([[1.0, 3.0, 2.0], [0.0, 9.0, 9.0]]), jnp.array([2, 0]), jnp.array([1.0, 0.0])))
    -1.0
    """
    return jnp.min(jnp.where(jnp.asarray(example_weight) > 0, margins(logits, target), jnp.inf))


def margins(logits: Float[Array, "B C"], target: Int[Array, " B"]) -> Float[Array, " B"]:
    """u_target − max_{c ≠ target} u_c of every row."""
    is_target = jnp.arange(logits.shape[1])[None] == target[:, None]
    own = jnp.sum(jnp.where(is_target, logits, 0), axis=1)
    return own - jnp.max(jnp.where(is_target, -jnp.inf, logits), axis=1)


_Seen = tuple[Float[Array, ""], CBMOutput]


class _Search(NamedTuple):
    """Where the search stands: n − 1, which was seen not to repair, and n, which was seen to where one is found."""

    low: Int[Array, ""]
    high: Int[Array, ""]
    is_found: Bool[Array, ""]
    margin_at_low: Float[Array, ""]
    at_high: _Seen
    num_trials: Int[Array, ""]


def _smallest(
    read: Callable[[Int[Array, ""]], _Seen], start: _Seen, wanted: Float[Array, ""], most: Int[Array, ""]
) -> _Search:
    """Doubles n until the margin is above the wanted one, then halves the gap; n is 0 where it is from the start.

    One loop does both, so that the subnetwork is compiled once for all trials.
    """

    def step(state: _Search) -> _Search:
        doubled = jnp.minimum(jnp.maximum(2 * state.high, 1), most)
        n = jnp.where(state.is_found, (state.low + state.high) // 2, doubled)
        seen = read(n)
        repairs = seen[0] > wanted
        # While nothing is found, what was tried last is the most that does not repair.
        is_high = repairs | ~state.is_found
        margin_at_low = jnp.where(is_high, jnp.where(state.is_found, state.margin_at_low, state.at_high[0]), seen[0])
        return _Search(
            jnp.where(is_high, jnp.where(state.is_found, state.low, state.high), n),
            jnp.where(is_high, n, state.high),
            state.is_found | repairs,
            margin_at_low,
            jax.tree.map(lambda new, old: jnp.where(is_high, new, old), seen, state.at_high),
            state.num_trials + 1,
        )

    def goes_on(state: _Search) -> Bool[Array, ""]:
        return jnp.where(state.is_found, state.high - state.low > 1, state.high < most)

    zero = jnp.int32(0)
    return jax.lax.while_loop(goes_on, step, _Search(zero, zero, start[0] > wanted, start[0], start, zero))


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
    guard: Guard | None,
    size: int,
) -> tuple[Ranked, Ranked]:
    """Kept weights to drop and pruned ones to grow, first those by which a loss falls most, from its gradients."""
    if guard is None:
        gains = {path: signed(weights[path], grads[path]) for path in mask}
    else:
        spared = spare(grads, guard)
        gains = {path: guarded(weights[path], spared[path], guard.costs[path]) for path in mask}
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
