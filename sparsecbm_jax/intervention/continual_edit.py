"""Continual edits: earlier corrections are retained, and other predictions stay as they were.

A minimal edit (`minimal_edit`) sees one text. Fifty of them, one after another, undo each other and change predictions
that nobody corrected. A continual edit is for all corrected texts of a concept together, and for anchors: texts that
are to be predicted as they were before any correction. It lowers

    J(M_k) = Σ_i max(0, m − margin_i) + (λ / |A|) Σ_{a ∈ A} ‖P (u_a − u_a⁰)‖²

with margin_i = u_target − max_{c ≠ target} u_c of corrected text i, m the requested margin, and P the projection that
subtracts the mean over classes, which a softmax ignores. In each round weights are ranked by their first-order gain
divided by the cost of the change for other texts. Several numbers of pairs are tried, and the number that lowers J most
is dropped and grown.

Reference: replay of earlier examples, Robins 1995, 'Catastrophic forgetting, rehearsal and pseudorehearsal';
outputs close to those of the old model, Li & Hoiem 2016, 'Learning without Forgetting'.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import AnyMasks
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.mask_edit import check_index
from sparsecbm_jax.intervention.ranking import EditCosts, ranked_swaps, swapped, swapped_mask
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import concept_output
from sparsecbm_jax.model.losses import margins
from sparsecbm_jax.model.sparse_cbm import ModelArrays

ANCHOR = -1  # in place of a target
# Pairs that the first round tries first.
_FIRST_PAIRS = 128
# Rounds end when every corrected text has this share of the requested margin.
_ENOUGH = 0.5


class ReplayedTexts(NamedTuple):
    """Corrected texts of a concept and anchors, a row each; padding rows of the batch do not count.

    Attributes:
        batch: The texts.
        targets: Class of each corrected row, `ANCHOR` for an anchor.
        logits: u_k of the anchors before any correction; its other rows are not read.
    """

    batch: Batch
    targets: Int[Array, " B"] | Int[np.ndarray, " B"]
    logits: Float[Array, "B C"] | Float[np.ndarray, "B C"]


class ContinualSettings(NamedTuple):
    """The settings of a continual edit. The defaults were chosen on validation: docs/results/intervention.md.

    Attributes:
        margin: m in logits, above 0.
        strength: λ, the weight of the anchors, at least 0.
        max_rounds: Most rounds, at least 1.
    """

    margin: float | Float[Array, ""] = 0.5
    strength: float | Float[Array, ""] = 2.0
    max_rounds: int | Int[Array, ""] = 8


DEFAULTS = ContinualSettings()


class ContinualEdit(NamedTuple):
    """The result of a continual edit.

    Attributes:
        num_changed: Weights dropped and grown, over all rounds; a weight that changes twice counts twice.
        num_rounds: Rounds that changed a weight.
        margins: u_target − max of the others, of each corrected row after the edit; +∞ of anchors and padding.
        drift: Mean over anchors of the squared distance of their centred logits from those before any correction.
    """

    num_changed: Int[Array, ""]
    num_rounds: Int[Array, ""]
    margins: Float[Array, " B"]
    drift: Float[Array, ""]


def continual_edit(
    config: CBMConfig,
    arrays: ModelArrays,
    concept: int | Int[Array, ""],
    texts: ReplayedTexts,
    *,
    costs: EditCosts | None = None,
    settings: ContinualSettings = DEFAULTS,
    max_pairs: int = 2048,
) -> tuple[AnyMasks, ContinualEdit]:
    """Edits concept k's mask so that every corrected row has its target, and anchors retain their logits.

    The function is pure, and compiled once for all concepts, targets and settings of a batch shape. As many weights are
    grown as dropped. Rounds end when every corrected row has half the margin, when no trial lowers J, or after
    `max_rounds`.

    Args:
        config: The model's static description.
        arrays: Parameters, masks and heads.
        concept: Index k of the concept.
        texts: All corrected texts of the concept, and the anchors.
        costs: Costs of a change for other texts, by which gains are divided; None counts every weight alike.
        settings: Margin, strength of the anchors, most rounds.
        max_pairs: Most pairs of weights that one round changes, at least 1.

    Returns:
        The new masks and the result. A row whose margin is not above zero does not have its target.

    Raises:
        ValueError: As `intervene`; or targets or logits do not fit the batch, or `max_pairs` is not positive.
    """
    masks_lib.check_masks(arrays.masks)
    check_index("concept", concept, 0, config.num_concepts)
    check_index("targets", texts.targets, ANCHOR, config.num_classes)
    check_index("max_rounds", settings.max_rounds, 1, np.iinfo(np.int32).max)
    rows = texts.batch.input_ids.shape[0]
    if jnp.shape(texts.targets) != (rows,) or jnp.shape(texts.logits) != (rows, config.num_classes):
        raise ValueError(
            f"targets and logits have shapes {jnp.shape(texts.targets)} and {jnp.shape(texts.logits)}; expected "
            f"({rows},) and ({rows}, {config.num_classes}) for a batch of {rows} rows and {config.num_classes} classes"
        )
    if max_pairs < 1:
        raise ValueError(f"max_pairs is {max_pairs}; expected at least 1")
    asked = ReplayedTexts(texts.batch, jnp.asarray(texts.targets, jnp.int32), jnp.asarray(texts.logits, jnp.float32))
    aims = ContinualSettings(
        jnp.asarray(settings.margin, jnp.float32),
        jnp.asarray(settings.strength, jnp.float32),
        jnp.asarray(settings.max_rounds, jnp.int32),
    )
    most = min(max_pairs, masks_lib.num_weights(arrays.concept_masks))
    return _continual_edit(config, arrays, jnp.asarray(concept, jnp.int32), asked, costs, aims, max_pairs=most)


class _Fit(NamedTuple):
    """The terms of J at some kernels: margins of the rows, and drift of the anchors."""

    margins: Float[Array, " B"]
    drift: Float[Array, ""]


class _Problem(NamedTuple):
    """J, as a function of the effective kernels of the subnetwork alone."""

    config: CBMConfig
    arrays: ModelArrays
    concept: Int[Array, ""]
    texts: ReplayedTexts
    settings: ContinualSettings

    def objective(self, kernels: Mapping[str, Float[Array, "..."]]) -> tuple[Float[Array, ""], _Fit]:
        """Computes J and its terms."""
        batch, targets, logits = self.texts
        is_real = jnp.asarray(batch.example_weight) > 0
        is_anchor, is_corrected = is_real & (targets == ANCHOR), is_real & (targets != ANCHOR)
        output = concept_output(self.config, self.arrays.params, self.arrays.heads, batch, kernels, self.concept)
        u = output.concept_logits[:, 0]
        of_rows = jnp.where(is_corrected, margins(u, jnp.asarray(targets)), jnp.inf)
        moved = u - logits
        moved -= jnp.mean(moved, axis=-1, keepdims=True)
        squares = jnp.where(is_anchor, jnp.sum(jnp.square(moved), axis=-1), 0)
        drift = jnp.sum(squares) / jnp.maximum(jnp.sum(is_anchor), 1)
        hinge = jnp.sum(jnp.maximum(self.settings.margin - of_rows, 0))
        return hinge + self.settings.strength * drift, _Fit(of_rows, drift)

    def is_short(self, fit: _Fit) -> Bool[Array, ""]:
        """Returns True while a corrected row has too small a margin for the rounds to end."""
        return jnp.min(fit.margins) <= _ENOUGH * self.settings.margin


class _Round(NamedTuple):
    mask: dict[str, Bool[Array, "..."]]
    first_pairs: Int[Array, ""]
    fit: _Fit
    num_changed: Int[Array, ""]
    number: Int[Array, ""]
    goes_on: Bool[Array, ""]


class _Trial(NamedTuple):
    num_pairs: Int[Array, ""]
    is_upward: Bool[Array, ""]
    best_pairs: Int[Array, ""]
    best: tuple[Float[Array, ""], _Fit]


@functools.partial(jax.jit, static_argnames=("config", "max_pairs"))
def _continual_edit(
    config: CBMConfig,
    arrays: ModelArrays,
    concept: Int[Array, ""],
    texts: ReplayedTexts,
    costs: EditCosts | None,
    settings: ContinualSettings,
    *,
    max_pairs: int,
) -> tuple[AnyMasks, ContinualEdit]:
    problem = _Problem(config, arrays, concept, texts, settings)
    params, masks = arrays.params, arrays.concept_masks
    start = masks_lib.concept(masks, concept)
    weights = {path: leaf_at(params, path) for path in start}

    def one_round(state: _Round) -> _Round:
        mask = state.mask
        kernels = masks_lib.kernels_of(params, mask)
        before, grads = jax.value_and_grad(problem.objective, has_aux=True)(kernels)
        dropped, grown = ranked_swaps(weights, mask, grads, costs, max_pairs)
        most = jnp.where(problem.is_short(before[1]), jnp.minimum(dropped.num, grown.num), 0)

        def after_swaps(n: Int[Array, ""]) -> tuple[Float[Array, ""], _Fit]:
            return problem.objective(swapped(kernels, weights, dropped, grown, n))

        n, (_, fit) = _best_number(after_swaps, before, jnp.minimum(state.first_pairs, most), most)
        has_moved = n > 0
        return _Round(
            mask=swapped_mask(mask, dropped, grown, n),
            first_pairs=jnp.maximum(n // 2, 1),
            fit=fit,
            num_changed=state.num_changed + 2 * n,
            number=state.number + has_moved,
            goes_on=has_moved & problem.is_short(fit),
        )

    def goes_on(state: _Round) -> Bool[Array, ""]:
        return state.goes_on & (state.number < settings.max_rounds)

    none = jnp.int32(0)
    nothing = _Fit(jnp.zeros(texts.batch.input_ids.shape[0]), jnp.float32(0))
    begin = _Round(start, jnp.int32(_FIRST_PAIRS), nothing, none, none, jnp.bool_(True))
    end = jax.lax.while_loop(goes_on, one_round, begin)
    found = ContinualEdit(end.num_changed, end.number, end.fit.margins, end.fit.drift)
    return masks_lib.replace_concept(masks, concept, end.mask), found


def _best_number(
    after_swaps: Callable[[Int[Array, ""]], tuple[Float[Array, ""], _Fit]],
    before: tuple[Float[Array, ""], _Fit],
    first: Int[Array, ""],
    most: Int[Array, ""],
) -> tuple[Int[Array, ""], tuple[Float[Array, ""], _Fit]]:
    """Searches the number of pairs to swap: doubles it while J falls; if doubling never helps, halves it.

    Args:
        after_swaps: Computes J after the first n pairs are swapped.
        before: J without a swap.
        first: The number that is tried first.
        most: The largest number.

    Returns:
        The number with the lowest J among those tried, 0 where none is lower than before, and J there.
    """

    def trial(state: _Trial) -> _Trial:
        n = state.num_pairs
        found = after_swaps(n)
        is_better = found[0] < state.best[0]
        best_pairs, best = jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), (n, found), (state.best_pairs, state.best)
        )
        # A few flips may change J by less than float32 resolves: that is no reason to halve.
        goes_up = state.is_upward & (found[0] <= state.best[0])
        goes_down = (is_better | (best_pairs == 0)) & ~state.is_upward
        turns = state.is_upward & ~goes_up & (best_pairs <= first)
        following = jnp.where(goes_up, 2 * n, jnp.where(turns, first // 2, jnp.where(goes_down, n // 2, 0)))
        return _Trial(following, goes_up, best_pairs, best)

    def goes_on(state: _Trial) -> Bool[Array, ""]:
        return (state.num_pairs > 0) & (state.num_pairs <= most)

    end = jax.lax.while_loop(goes_on, trial, _Trial(first, jnp.bool_(True), jnp.int32(0), before))
    return end.best_pairs, end.best
