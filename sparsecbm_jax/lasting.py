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

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.cbm import CBMConfig, Heads
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.guards import concept_output
from sparsecbm_jax.intervention import Guard, check_index, check_masks
from sparsecbm_jax.masks import Masks, Params
from sparsecbm_jax.minimal import margins, ranked_swaps, swapped, swapped_mask

ANCHOR = -1  # in place of a target
# m, λ and the most rounds, unless others are asked for: see RESULTS.md, Intervention.
MARGIN, STRENGTH, MAX_ROUNDS = 0.5, 2.0, 8
# Pairs that the first round tries first.
_FIRST_PAIRS = 128
# Of the margin asked for, what every corrected text has to have for the rounds to end.
_ENOUGH = 0.5
# Widths of batches are multiples of this, so that few programs do.
_WIDTH = 32


class LastingEdit(NamedTuple):
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


def lasting_edit(
    config: CBMConfig,
    params: Params,
    masks: Masks,
    heads: Heads,
    batch: Batch,
    concept: int | Int[Array, ""],
    targets: Int[Array, " B"] | Int[np.ndarray, " B"],
    logits: Float[Array, "B C"] | Float[np.ndarray, "B C"],
    *,
    guard: Guard | None = None,
    margin: float | Float[Array, ""] = MARGIN,
    strength: float | Float[Array, ""] = STRENGTH,
    max_rounds: int | Int[Array, ""] = MAX_ROUNDS,
    max_pairs: int = 2048,
) -> tuple[Masks, LastingEdit]:
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
    return _lasting_edit(
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


@functools.partial(jax.jit, static_argnums=0)
def concept_logits(
    config: CBMConfig, params: Params, masks: Masks, heads: Heads, batch: Batch, concept: int | Int[Array, ""]
) -> Float[Array, "B C"]:
    """u_k of a batch, from one pass through subnetwork k."""
    kernels = masks_lib.kernels_of(params, masks_lib.concept(masks, concept))
    return concept_output(config, params, heads, batch, kernels, jnp.asarray(concept)).concept_logits[:, 0]


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
def _lasting_edit(
    config: CBMConfig,
    params: Params,
    masks: Masks,
    heads: Heads,
    batch: Batch,
    concept: Int[Array, ""],
    targets: Int[Array, " B"],
    logits: Float[Array, "B C"],
    guard: Guard | None,
    margin: Float[Array, ""],
    strength: Float[Array, ""],
    max_rounds: Int[Array, ""],
    *,
    max_pairs: int,
) -> tuple[Masks, LastingEdit]:
    start = masks_lib.concept(masks, concept)
    weights = {path: masks_lib.leaf_at(params, path) for path in start}
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
    found = LastingEdit(end.num_changed, end.number, end.reading.margins, end.reading.drift)
    return masks_lib.replace_concept(masks, concept, end.mask), found


@dataclasses.dataclass(frozen=True)
class _Text:
    input_ids: Int[np.ndarray, " T"]
    target: int


class _Draw(NamedTuple):
    """Corrected texts of one edit, the newest first, then its anchors; targets of the former, indices of the latter."""

    rows: list[Int[np.ndarray, " T"]]
    targets: list[int]
    anchors: Int[np.ndarray, " A"]


class Replay:
    """What lasting edits are to answer for: corrections so far, and anchors.

    Each correction draws the texts of its edit, by one generator that goes on from correction to correction: the same
    corrections in the same order have the same edits. A batch has always as many rows, so that edits are compiled once
    for each width of texts; anchors take what the corrections leave. Where corrections would take more than half, the
    newest stays and the others are drawn by lot.
    """

    def __init__(self, anchors: Sequence[Batch], *, num_rows: int = 64, seed: int = 0) -> None:
        """Takes the real rows of some batches as texts that are to be read as they are now.

        Raises:
          ValueError: if there is no anchor, or `num_rows` is below 4.
        """
        if num_rows < 4:
            raise ValueError(f"num_rows is {num_rows}; expected at least 4")
        self._batches, self._num_rows, self._seed = list(anchors), num_rows, seed
        self._anchors = [ids for batch in anchors for ids in _real_rows(batch)]
        if not self._anchors:
            raise ValueError("there are no anchors; expected batches with texts that are to be read as they are")
        self._rng = np.random.default_rng(seed)
        self._corrected: dict[int, list[_Text]] = {}
        self._drawn: dict[int, _Draw] = {}
        self._logits: dict[int, Float[np.ndarray, "A C"]] = {}
        self._width = 0
        # No batch is wider than those that were given, which fit the backbone.
        self._widest = max(batch.input_ids.shape[1] for batch in anchors)

    def emptied(self) -> "Replay":
        """One of the same anchors, held as they are here, that draws from the beginning and has no corrections."""
        fresh = copy.copy(self)
        fresh._rng, fresh._corrected, fresh._drawn = np.random.default_rng(self._seed), {}, {}
        return fresh

    def add(self, concept: int, batch: Batch, target: int) -> None:
        """Remembers the one text of a batch, and the class that the concept should have in it: no longer another."""
        (ids,) = _real_rows(batch)
        earlier = self._corrected.get(concept, [])
        others = [text for text in earlier if not np.array_equal(text.input_ids, ids)]
        self._corrected[concept] = [*others, _Text(ids, target)]
        self._widest = max(self._widest, batch.input_ids.shape[1])
        self._drawn[concept] = drawn = self._draw(concept)
        longest = max(map(len, drawn.rows))
        self._width = max(self._width, min(-(-longest // _WIDTH) * _WIDTH, self._widest))

    def _draw(self, concept: int) -> _Draw:
        newest, *others = reversed(self._corrected[concept])
        most = self._num_rows // 2 - 1
        if len(others) > most:
            others = [others[i] for i in self._rng.choice(len(others), most, replace=False)]
        texts = [newest, *others]
        count = min(self._num_rows - len(texts), len(self._anchors))
        anchors = self._rng.choice(len(self._anchors), count, replace=False)
        rows = [text.input_ids for text in texts] + [self._anchors[i] for i in anchors]
        return _Draw(rows, [text.target for text in texts], anchors)

    def hold(self, concept: int, logits_of: Callable[[Batch], Float[Array, "B C"]]) -> None:
        """Asks once how the concept reads the anchors: before its first edit."""
        if concept not in self._logits:
            found = [np.asarray(logits_of(batch))[_is_real(batch)] for batch in self._batches]
            self._logits[concept] = np.concatenate(found)

    def batch(self, concept: int) -> tuple[Batch, Int[np.ndarray, " B"], Float[np.ndarray, "B C"]]:
        """What the concept's newest correction drew, its own text first: batch, targets, logits for `lasting_edit`."""
        rows, asked, anchors = self._drawn[concept]
        held = self._logits[concept]
        shape = (self._num_rows, self._width)
        input_ids, attention_mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)], attention_mask[row, : len(ids)] = ids, 1
        # A row without a token would be 0 / 0 in mean pooling.
        attention_mask[len(rows) :, 0] = 1
        targets = np.full(self._num_rows, ANCHOR, np.int32)
        targets[: len(asked)] = asked
        logits = np.zeros((self._num_rows, held.shape[1]), np.float32)
        logits[len(asked) : len(rows)] = held[anchors]
        nothing = np.full(self._num_rows, -1, np.int32)
        weight = (np.arange(self._num_rows) < len(rows)).astype(np.float32)
        return Batch(input_ids, attention_mask, nothing[:, None], nothing, weight, nothing), targets, logits


def _is_real(batch: Batch) -> Bool[np.ndarray, " B"]:
    return np.asarray(batch.example_weight) > 0


def _real_rows(batch: Batch) -> list[Int[np.ndarray, " T"]]:
    ids, attended = np.asarray(batch.input_ids), np.asarray(batch.attention_mask) > 0
    return [row[kept] for row, kept, is_real in zip(ids, attended, _is_real(batch), strict=True) if is_real]
