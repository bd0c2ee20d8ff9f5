"""The subject of corrections: a model, rows with gold concepts, and the model's predictions for them."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from sparsecbm_jax.data.batches import Tokenized, batch_of
from sparsecbm_jax.intervention.editors import Editor, is_repaired
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, num_changed
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays

_BATCH = 32


class SplitPredictions(NamedTuple):
    """A model's predictions for some rows.

    Attributes:
        concepts: Predicted class of each concept.
        labels: Predicted label.
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
        config, arrays: The model before any correction.
        split: Rows with gold concepts.
        groups: Name of the original text of each row.
        class_activations: What a concept that is set to a class is given; see `SparseCBM.class_activations`.
    """

    config: CBMConfig
    arrays: ModelArrays
    split: Tokenized
    groups: Sequence[str]
    class_activations: Float[np.ndarray, "K C C"]

    @functools.cached_property
    def predictions(self) -> SplitPredictions:
        """Predictions for all rows, before any correction."""
        return predict_split(self.config, self.arrays, self.split, np.arange(self.split.num_examples))

    @property
    def wrong(self) -> Bool[np.ndarray, "N K"]:
        """True at labelled cells that are predicted incorrectly."""
        return (self.predictions.concepts != self.split.concepts) & (self.split.concepts >= 0)

    def wrong_of(self, row: int) -> list[int]:
        """Returns the concepts of a row that are predicted incorrectly."""
        return [int(k) for k in np.flatnonzero(self.wrong[row])]

    def draw(self, max_cells: int, seed: int) -> list[int]:
        """Draws rows with wrong cells, as many as have at most `max_cells` wrong cells together, but at least one row.

        Args:
            max_cells: Most wrong cells; 0 takes all rows.
            seed: Seed of the order.

        Raises:
            ValueError: No cell is wrong.
        """
        counts = self.wrong.sum(axis=1)
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(counts))
        if not len(rows):
            raise ValueError("every labelled concept of the split is predicted correctly; there is nothing to correct")
        fitting = int(np.sum(np.cumsum(counts[rows]) <= max_cells)) if max_cells else len(rows)
        return [int(row) for row in rows[: max(fitting, 1)]]

    def draw_held_out(self, edited: Sequence[int], num_rows: int, seed: int) -> list[int]:
        """Draws rows that share no original with the edited ones.

        Args:
            edited: The edited rows.
            num_rows: Most rows; 0 takes all of them.
            seed: Seed of the draw.
        """
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
    """The outcome of one correction.

    Attributes:
        arrays: The model's arrays now.
        num_changed: Changed numbers of the model: booleans of the masks, and trained weights.
        is_repaired: True where the text has the requested class now.
        seconds: Duration of the correction.
    """

    arrays: ModelArrays
    num_changed: int
    is_repaired: bool
    seconds: float


def measure(editor: Editor, config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> Outcome:
    """Makes a correction and measures its outcome.

    Args:
        editor: The editor that makes it.
        config: The model's static description.
        arrays: Parameters, masks and heads.
        correction: The correction.
    """
    began = time.monotonic()
    new, edit = jax.block_until_ready(editor(config, arrays, correction))
    seconds = time.monotonic() - began
    trained = _num_different(arrays._replace(masks=None), new._replace(masks=None))
    return Outcome(new, sum(num_changed(edit)) + trained, is_repaired(edit, correction.batch.example_weight), seconds)


def _num_different(old: ModelArrays, new: ModelArrays) -> int:
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return sum(int(np.sum(np.asarray(one) != np.asarray(other))) for one, other in pairs if one is not other)
