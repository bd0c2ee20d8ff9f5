"""Edits that keep earlier corrections in force and leave everything else where it was.

A smallest edit (`minimal`) looks at one text. Fifty of them, one after another, undo each other and move what nobody
asked about. Here one edit answers for all corrected texts of a concept together, and for anchors, texts that are to be
read as they were before any correction:

    J(M_k) = Σ_i max(0, m − margin_i) + (λ / |A|) Σ_{a ∈ A} ‖P (u_a − u_a⁰)‖²

with margin_i = u_target − max_{c ≠ target} u_c of corrected text i, m the margin asked for, and P taking the mean over
classes away, which a softmax does not see. Round by round weights are ranked by what they gain to first order,
over what a guard says that they cost, and as many are dropped and grown as lower J most among the numbers tried.

Reference: replay of what was learnt before, Robins 1995, 'Catastrophic forgetting, rehearsal and pseudorehearsal';
outputs held at those of the old model, Li & Hoiem 2016, 'Learning without Forgetting'.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import Masks, check_masks
from sparsecbm_jax.core.trees import Params, leaf_at
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.mask_edit import check_index
from sparsecbm_jax.intervention.ranking import EditCosts, ranked_swaps, swapped, swapped_mask
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.forward import concept_output
from sparsecbm_jax.model.losses import margins

ANCHOR = -1  # in place of a target
# m, λ and the most rounds, unless others are asked for: see RESULTS.md, Intervention.
MARGIN, STRENGTH, MAX_ROUNDS = 0.5, 2.0, 8
# Pairs that the first round tries first.
_FIRST_PAIRS = 128
# Of the margin asked for, what every corrected text has to have for the rounds to end.
_ENOUGH = 0.5


class ContinualEdit(NamedTuple):
    """What the rounds came to.

    Attributes:
        num_changed: weights dropped and grown, round by round; one that went back and forth counts each time.
        num_rounds: rounds that changed something.
        margins: u_target − max of the others, of each corrected row after the edit; +∞ of anchors and padding.
        drift: mean over anchors of the squared distance that their centred logits are from where they were.
    """

    num_changed: Int[Array, ""]
    num_rounds: Int[Array, ""]
    margins: Float[Array, " B"]
    drift: Float[Array, ""]


def continual_edit(
    config: CBMConfig,
    params: Params,
    masks: Masks,
    heads: Heads,
    batch: Batch,
    concept: int | Int[Array, ""],
    targets: Int[Array, " B"] | Int[np.ndarray, " B"],
    logits: Float[Array, "B C"] | Float[np.ndarray, "B C"],
    *,
    guard: EditCosts | None = None,
    margin: float | Float[Array, ""] = MARGIN,
    strength: float | Float[Array, ""] = STRENGTH,
    max_rounds: int | Int[Array, ""] = MAX_ROUNDS,
    max_pairs: int = 2048,
) -> tuple[Masks, ContinualEdit]:
    """Edits concept k's mask so that every corrected row has its target, and anchors keep their logits.

    Pure, and compiled once for all concepts, targets, margins and strengths of a batch shape. As many weights are
    grown as dropped. Rounds end when every corrected row has half the margin, when no trial lowers J, or at the most.

    Args:
        config, params, masks, heads: as for `intervention.intervene`.
        batch: all corrected texts of the concept and the anchors; padding rows do not count.
        concept: k.
        targets: class of each corrected row, `ANCHOR` for an anchor.
        logits: u_k of the anchors before any correction; other rows of it are not looked at.
        guard: what a change costs everything else, by which gains are divided; None counts every weight alike.
        margin: m, above 0.
        strength: λ.
        max_rounds: the most rounds.
        max_pairs: the most pairs of weights that one round changes.

    Returns:
        The new masks and what the rounds came to. A row whose margin is not above zero is still not read as asked.

    Raises:
        ValueError: as `intervene`; or `targets` or `logits` do not fit the batch, or `max_pairs` is not positive.
    """
    check_masks(masks)
    check_index("concept", concept, 0, config.num_concepts)
    check_index("targets", targets, ANCHOR, config.num_classes)
    check_index("max_rounds", max_rounds, 1, np.iinfo(np.int32).max)
    rows = batch.input_ids.shape[0]
    if jnp.shape(targets) != (rows,) or jnp.shape(logits) != (rows, config.num_classes):
        raise ValueError(
            f"targets and logits have shapes {jnp.shape(targets)} and {jnp.shape(logits)}; expected ({rows},) and "
            f"({rows}, {config.num_classes}) for a batch of {rows} rows and {config.num_classes} classes"
        )
    if max_pairs < 1:
        raise ValueError(f"max_pairs is {max_pairs}; expected at least 1")
    return _continual_edit(
        config,
        params,
        masks,
        heads,
        batch,
        jnp.asarray(concept, jnp.int32),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(logits, jnp.float32),
        guard,
        jnp.asarray(margin, jnp.float32),
        jnp.asarray(strength, jnp.float32),
        jnp.asarray(max_rounds, jnp.int32),
        max_pairs=min(max_pairs, masks_lib.num_weights(masks)),
    )


class _Reading(NamedTuple):
    """What J is made of, at some kernels."""

    margins: Float[Array, " B"]
    drift: Float[Array, ""]


class _Round(NamedTuple):
    mask: dict[str, Bool[Array, "..."]]
    first_pairs: Int[Array, ""]
    reading: _Reading
    num_changed: Int[Array, ""]
    number: Int[Array, ""]
    goes_on: Bool[Array, ""]


class _Trial(NamedTuple):
    num_pairs: Int[Array, ""]
    is_upward: Bool[Array, ""]
    best_pairs: Int[Array, ""]
    best: tuple[Float[Array, ""], _Reading]


@functools.partial(jax.jit, static_argnames=("config", "max_pairs"))
def _continual_edit(
    config: CBMConfig,
    params: Params,
    masks: Masks,
    heads: Heads,
    batch: Batch,
    concept: Int[Array, ""],
    targets: Int[Array, " B"],
    logits: Float[Array, "B C"],
    guard: EditCosts | None,
    margin: Float[Array, ""],
    strength: Float[Array, ""],
    max_rounds: Int[Array, ""],
    *,
    max_pairs: int,
) -> tuple[Masks, ContinualEdit]:
    start = masks_lib.concept(masks, concept)
    weights = {path: leaf_at(params, path) for path in start}
    is_real = jnp.asarray(batch.example_weight) > 0
    is_anchor, is_corrected = is_real & (targets == ANCHOR), is_real & (targets != ANCHOR)

    def objective(kernels: Mapping[str, Float[Array, "..."]]) -> tuple[Float[Array, ""], _Reading]:
        """J, and what it is made of."""
        u = concept_output(config, params, heads, batch, kernels, concept).concept_logits[:, 0]
        of_rows = jnp.where(is_corrected, margins(u, targets), jnp.inf)
        moved = u - logits
        moved -= jnp.mean(moved, axis=-1, keepdims=True)
        squares = jnp.where(is_anchor, jnp.sum(jnp.square(moved), axis=-1), 0)
        drift = jnp.sum(squares) / jnp.maximum(jnp.sum(is_anchor), 1)
        return jnp.sum(jnp.maximum(margin - of_rows, 0)) + strength * drift, _Reading(of_rows, drift)

    def is_short(reading: _Reading) -> Bool[Array, ""]:
        return jnp.min(reading.margins) <= _ENOUGH * margin

    def one_round(state: _Round) -> _Round:
        mask = state.mask
        kernels = masks_lib.kernels_of(params, mask)
        before, grads = jax.value_and_grad(objective, has_aux=True)(kernels)
        dropped, grown = ranked_swaps(weights, mask, grads, guard, max_pairs)
        most = jnp.where(is_short(before[1]), jnp.minimum(dropped.num, grown.num), 0)
        first = jnp.minimum(state.first_pairs, most)

        def trial(state: _Trial) -> _Trial:
            """Twice as many pairs while J falls; if that never helped, half as many, until J falls and as long as."""
            n = state.num_pairs
            found = objective(swapped(kernels, weights, dropped, grown, n))
            is_better = found[0] < state.best[0]
            best_pairs, best = jax.tree.map(
                lambda new, old: jnp.where(is_better, new, old), (n, found), (state.best_pairs, state.best)
            )
            # A few flips may do nothing that float32 can tell: they are no reason to turn.
            goes_up = state.is_upward & (found[0] <= state.best[0])
            goes_down = (is_better | (best_pairs == 0)) & ~state.is_upward
            turns = state.is_upward & ~goes_up & (best_pairs <= first)
            following = jnp.where(goes_up, 2 * n, jnp.where(turns, first // 2, jnp.where(goes_down, n // 2, 0)))
            return _Trial(following, goes_up, best_pairs, best)

        def goes_on(state: _Trial) -> Bool[Array, ""]:
            return (state.num_pairs > 0) & (state.num_pairs <= most)

        end = jax.lax.while_loop(goes_on, trial, _Trial(first, jnp.bool_(True), jnp.int32(0), before))
        n, reading = end.best_pairs, end.best[1]
        has_moved = n > 0
        return _Round(
            mask=swapped_mask(mask, dropped, grown, n),
            first_pairs=jnp.maximum(n // 2, 1),
            reading=reading,
            num_changed=state.num_changed + 2 * n,
            number=state.number + has_moved,
            goes_on=has_moved & is_short(reading),
        )

    def is_wanted(state: _Round) -> Bool[Array, ""]:
        return state.goes_on & (state.number < max_rounds)

    none = jnp.int32(0)
    nothing = _Reading(jnp.zeros(is_real.shape), jnp.float32(0))
    begin = _Round(start, jnp.int32(_FIRST_PAIRS), nothing, none, none, jnp.bool_(True))
    end = jax.lax.while_loop(is_wanted, one_round, begin)
    found = ContinualEdit(end.num_changed, end.number, end.reading.margins, end.reading.drift)
    return masks_lib.replace_concept(masks, concept, end.mask), found
