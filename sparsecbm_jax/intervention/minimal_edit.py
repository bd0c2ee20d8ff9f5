"""The smallest edit that repairs a concept: the counterfactual explanation of a prediction in terms of its subnetwork.

Weights are ranked once, by one gradient. Doubling and bisection then find how many of the ranking suffice, and run the
subnetwork at each trial. The effect need not grow with every weight: the number found repairs, and the number below it
does not, as both were tried.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import AnyMasks
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, MaskEdit, checked, edit_between
from sparsecbm_jax.intervention.ranking import EditCosts, ranked_swaps, swapped, swapped_mask
from sparsecbm_jax.model.config import CBMConfig, CBMOutput
from sparsecbm_jax.model.forward import forward, subnetwork_output
from sparsecbm_jax.model.losses import least_margin
from sparsecbm_jax.model.sparse_cbm import ModelArrays


class MinimalEdit(NamedTuple):
    """The result of the search.

    Attributes:
        edit: The edit; it changes no weight where no edit repairs, or none is needed.
        num_pairs: n, the number of weights dropped, and as many grown.
        is_repaired: True where all rows have their target with the margin now.
        margin: Least margin of a row after the edit, u_target − max of the others.
        margin_below: The same with n − 1 pairs, which is not above the requested one; NaN where n is 0.
        num_trials: Number of runs of the subnetwork.
    """

    edit: MaskEdit
    num_pairs: Int[Array, ""]
    is_repaired: Bool[Array, ""]
    margin: Float[Array, ""]
    margin_below: Float[Array, ""]
    num_trials: Int[Array, ""]


def minimal_edit(
    config: CBMConfig,
    arrays: ModelArrays,
    correction: ConceptCorrection,
    *,
    margin: float | Float[Array, ""] = 0.0,
    costs: EditCosts | None = None,
    max_pairs: int = 4096,
) -> tuple[AnyMasks, MinimalEdit]:
    """Drops the n most harmful kept weights of concept k and grows the n most helpful pruned ones, for the smallest n.

    The function is pure, and compiled once for all concepts, targets and margins of a batch shape. Weights are ranked
    by their first-order gain of the least margin; see `ranking.signed`.

    Args:
        config: The model's static description.
        arrays: Parameters, masks and heads.
        correction: The texts, the concept and the class that it should have; padding rows do not count, a label is not
            read.
        margin: Logits by which u_target has to exceed the other classes' logits.
        costs: Costs of a change for other texts; see `EditCosts`. None counts every weight alike.
        max_pairs: Most pairs that are tried, at least 1.

    Returns:
        The new masks and the result of the search; the same masks where `max_pairs` pairs do not repair.

    Raises:
        ValueError: As `intervene`; or `max_pairs` is not positive.
    """
    correction = checked(config, arrays, correction._replace(label=None))
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin}; expected a number of logits, at least 0")
    if max_pairs < 1:
        raise ValueError(f"max_pairs is {max_pairs}; expected at least 1")
    most = min(max_pairs, masks_lib.num_weights(arrays.concept_masks))
    return _minimal_edit(config, arrays, correction, jnp.asarray(margin, jnp.float32), costs, max_pairs=most)


@functools.partial(jax.jit, static_argnames=("config", "max_pairs"))
def _minimal_edit(
    config: CBMConfig,
    arrays: ModelArrays,
    correction: ConceptCorrection,
    needed: Float[Array, ""],
    costs: EditCosts | None,
    *,
    max_pairs: int,
) -> tuple[AnyMasks, MinimalEdit]:
    params, masks, heads = arrays.params, arrays.concept_masks, arrays.heads
    batch, concept, target = correction.batch, correction.concept, jnp.asarray(correction.target)
    before = forward(config, arrays, batch)
    mask = masks_lib.concept(masks, concept)
    weights = {path: leaf_at(params, path) for path in mask}
    kernels = masks_lib.kernels_of(params, mask)

    def run(kernels: Mapping[str, Float[Array, "..."]]) -> tuple[Float[Array, ""], CBMOutput]:
        output = subnetwork_output(config, params, heads, batch, kernels, concept, before.activations)
        return least_margin(output.concept_logits[:, 0], target, batch.example_weight), output

    start, grads = jax.value_and_grad(run, has_aux=True)(kernels)
    # Negated, since the margin has to rise.
    dropped, grown = ranked_swaps(weights, mask, {path: -grad for path, grad in grads.items()}, costs, max_pairs)
    most = jnp.minimum(dropped.num, grown.num)

    search = _smallest(lambda n: run(swapped(kernels, weights, dropped, grown, n)), start, needed, most)
    count = jnp.where(search.is_found, search.high, 0)
    margin, after = jax.tree.map(
        lambda at_high, at_start: jnp.where(count > 0, at_high, at_start), search.at_high, start
    )
    new_mask = swapped_mask(mask, dropped, grown, count)
    edit = edit_between(mask, new_mask, before, after, correction, count)
    margin_below = jnp.where(count > 0, search.margin_at_low, jnp.nan)
    found = MinimalEdit(edit, count, search.is_found, margin, margin_below, search.num_trials)
    return masks_lib.replace_concept(masks, concept, new_mask), found


_Seen = tuple[Float[Array, ""], CBMOutput]


class _Search(NamedTuple):
    """The state of the search: `low` pairs do not repair; `high` pairs do, once a repairing number is found."""

    low: Int[Array, ""]
    high: Int[Array, ""]
    is_found: Bool[Array, ""]
    margin_at_low: Float[Array, ""]
    at_high: _Seen
    num_trials: Int[Array, ""]


def _smallest(
    run: Callable[[Int[Array, ""]], _Seen], start: _Seen, needed: Float[Array, ""], most: Int[Array, ""]
) -> _Search:
    """Doubles n until the margin is above the needed one, then halves the gap; n is 0 where no edit is needed.

    One loop does both, so that the subnetwork is compiled once for all trials.
    """

    def step(state: _Search) -> _Search:
        doubled = jnp.minimum(jnp.maximum(2 * state.high, 1), most)
        n = jnp.where(state.is_found, (state.low + state.high) // 2, doubled)
        seen = run(n)
        repairs = seen[0] > needed
        # Until a number repairs, the last one that was tried is the largest that does not.
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
    return jax.lax.while_loop(goes_on, step, _Search(zero, zero, start[0] > needed, start[0], start, zero))
