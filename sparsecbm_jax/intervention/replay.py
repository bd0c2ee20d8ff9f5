"""Texts of a continual edit: corrections so far, and anchors."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.continual_edit import ANCHOR, ReplayedTexts

# Widths of batches are multiples of this, so that few programs suffice.
_WIDTH = 32


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
    """The texts of continual edits: corrections so far, and anchors.

    Each correction draws the texts of its edit, with one generator for all corrections: the same corrections in the
    same order have the same edits. All batches have the same number of rows, so that edits are compiled once for each
    width of texts; anchors fill the rows without corrections. If corrections would take more than half of the rows, the
    newest is always used and the others are drawn at random.
    """

    def __init__(self, anchors: Sequence[Batch], *, num_rows: int = 64, seed: int = 0) -> None:
        """Takes the real rows of batches as anchors, whose predictions must not change.

        Args:
            anchors: Batches of training texts.
            num_rows: Texts of one edit, at least 4; at most half of them are corrections.
            seed: Seed of the draw of texts.

        Raises:
            ValueError: There is no anchor, or `num_rows` is below 4.
        """
        if num_rows < 4:
            raise ValueError(f"num_rows is {num_rows}; expected at least 4")
        self._batches, self._num_rows, self._seed = list(anchors), num_rows, seed
        self._anchors = [ids for batch in anchors for ids in _real_rows(batch)]
        if not self._anchors:
            raise ValueError("there are no anchors; expected batches with texts whose predictions must not change")
        self._rng = np.random.default_rng(seed)
        self._corrected: dict[int, list[_Text]] = {}
        self._drawn: dict[int, _Draw] = {}
        self._logits: dict[int, Float[np.ndarray, "A C"]] = {}
        self._width = 0
        # No batch is wider than the given ones, which fit the backbone.
        self._widest = max(batch.input_ids.shape[1] for batch in anchors)

    def emptied(self) -> "Replay":
        """Returns a replay of the same anchors and logits, without corrections and with a new generator."""
        fresh = copy.copy(self)
        fresh._rng, fresh._corrected, fresh._drawn = np.random.default_rng(self._seed), {}, {}
        return fresh

    def add(self, concept: int, batch: Batch, target: int) -> None:
        """Adds a correction, which replaces an earlier one of the same text and concept.

        Args:
            concept: Index of the concept.
            batch: A batch of one text.
            target: Class that the concept should have there.
        """
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
        """Stores the concept's logits of the anchors; they are computed once, before its first edit.

        Args:
            concept: Index of the concept.
            logits_of: Computes the concept's logits of a batch.
        """
        if concept not in self._logits:
            found = [np.asarray(logits_of(batch))[_is_real(batch)] for batch in self._batches]
            self._logits[concept] = np.concatenate(found)

    def texts(self, concept: int) -> ReplayedTexts:
        """Returns the texts that the concept's newest correction drew, its own text first."""
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
        batch = Batch(input_ids, attention_mask, nothing[:, None], nothing, weight, nothing)
        return ReplayedTexts(batch, targets, logits)


def _is_real(batch: Batch) -> Bool[np.ndarray, " B"]:
    return np.asarray(batch.example_weight) > 0


def _real_rows(batch: Batch) -> list[Int[np.ndarray, " T"]]:
    ids, attended = np.asarray(batch.input_ids), np.asarray(batch.attention_mask) > 0
    return [row[kept] for row, kept, is_real in zip(ids, attended, _is_real(batch), strict=True) if is_real]
