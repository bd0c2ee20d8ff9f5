"""What corrections are measured on: a model, rows with gold concepts, and what the model makes of them."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from sparsecbm_jax.data.batches import Tokenized, batch_of
from sparsecbm_jax.intervention.editors import Editor, is_repaired
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, num_changed
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays

_BATCH = 32


class SplitPredictions(NamedTuple):
    """What a model makes of some rows.

    Attributes:
        concepts: the class of each concept.
        labels: the label.
    """

    concepts: Int[np.ndarray, "N K"]
    labels: Int[np.ndarray, " N"]


class Cell(NamedTuple):
    """One concept of one row."""

    row: int
    concept: int


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model and the rows that it is corrected on.

    Attributes:
        config, arrays: the model before any correction.
        split: rows with gold concepts.
        groups: of each row, the original that it is an edit of.
    """

    config: CBMConfig
    arrays: ModelArrays
    split: Tokenized
    groups: Sequence[str]

    @functools.cached_property
    def predictions(self) -> SplitPredictions:
        """Of all rows, before any correction."""
        return predict_split(self.config, self.arrays, self.split, np.arange(self.split.num_examples))

    @property
    def wrong(self) -> Bool[np.ndarray, "N K"]:
        """Labelled cells that are predicted incorrectly."""
        return (self.predictions.concepts != self.split.concepts) & (self.split.concepts >= 0)

    def wrong_of(self, row: int) -> list[int]:
        """The concepts of a row that are predicted incorrectly."""
        return [int(k) for k in np.flatnonzero(self.wrong[row])]

    def draw(self, max_cells: int, seed: int) -> list[int]:
        """Rows with wrong cells, in an order drawn by the seed, as long as these come to at most `max_cells`.

        One row at least; all of them where `max_cells` is 0.

        Raises:
            ValueError: if no cell is wrong.
        """
        counts = self.wrong.sum(axis=1)
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(counts))
        if not len(rows):
            raise ValueError("every labelled concept of the split is predicted correctly; there is nothing to correct")
        fitting = int(np.sum(np.cumsum(counts[rows]) <= max_cells)) if max_cells else len(rows)
        return [int(row) for row in rows[: max(fitting, 1)]]

    def draw_held_out(self, edited: Sequence[int], num_rows: int, seed: int) -> list[int]:
        """At most `num_rows` rows that share no original with the edited ones; all of those where it is 0."""
        taken = {self.groups[row] for row in edited}
        rest = [row for row, group in enumerate(self.groups) if group not in taken]
        chosen = np.random.default_rng(seed).permutation(len(rest))[: num_rows or None]
        return [rest[i] for i in sorted(chosen)]


def predict_split(
    config: CBMConfig, arrays: ModelArrays, split: Tokenized, rows: Sequence[int] | Int[np.ndarray, " N"]
) -> SplitPredictions:
    """Predicts some rows of a split, in their order."""
    forward, size = make_forward(config), min(_BATCH, len(rows))
    ordered = np.asarray(rows)[np.argsort(split.lengths[np.asarray(rows)], kind="stable")]
    concepts: dict[int, Any] = {}
    labels: dict[int, Any] = {}
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        output = forward(arrays, batch_of(split, part, batch_size=size))
        concepts |= dict(zip(part.tolist(), np.asarray(output.concept_logits).argmax(-1), strict=False))
        labels |= dict(zip(part.tolist(), np.asarray(output.label_logits).argmax(-1), strict=False))
    return SplitPredictions(
        np.stack([concepts[int(row)] for row in rows]), np.array([labels[int(row)] for row in rows])
    )


class Outcome(NamedTuple):
    """What one correction did.

    Attributes:
        arrays: the model's arrays now.
        num_changed: numbers of the model that changed: booleans of the masks, and trained weights.
        is_repaired: whether the text has the asked class now.
        seconds: what it took.
    """

    arrays: ModelArrays
    num_changed: int
    is_repaired: bool
    seconds: float


def measure(editor: Editor, config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> Outcome:
    """Makes a correction and says what it did."""
    began = time.monotonic()
    new, edit = jax.block_until_ready(editor(config, arrays, correction))
    seconds = time.monotonic() - began
    trained = _num_different(arrays._replace(masks=None), new._replace(masks=None))
    return Outcome(new, sum(num_changed(edit)) + trained, is_repaired(edit, correction.batch.example_weight), seconds)


def _num_different(old: ModelArrays, new: ModelArrays) -> int:
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return sum(int(np.sum(np.asarray(one) != np.asarray(other))) for one, other in pairs if one is not other)
