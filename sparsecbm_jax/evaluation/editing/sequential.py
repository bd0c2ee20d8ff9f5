"""Corrections one after another, all kept in force: what they repair, what they cost, and what they teach.

A review comes, the model reads it and is scored; then its gold concepts are revealed, and every concept that was read
wrongly is corrected by one arm (`arms`). The headline is the accuracy *before* the reveal, which can fall. After the
stream the model is scored on reviews that share no original with those of the stream, on the corrected cells
themselves, and on the siblings of corrected reviews: edits of one original text, some of which change the concept.

Reference: the protocol is prequential evaluation (Dawid 1984); siblings are those of CEBaB (Abraham et al. 2022).
Deviation: the paper picks the wrong predictions by their gold labels and scores those alone, which cannot lose.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from sparsecbm_jax.data.batches import Tokenized, batch_of
from sparsecbm_jax.intervention.editors import Editor
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


@dataclasses.dataclass(frozen=True)
class SequentialReport:
    """What a stream of corrections did; shares are of 1, and NaN where there is nothing to count.

    Attributes:
        num_reviews, num_edits: reviews that came, and concepts that were corrected.
        repaired: share of the corrections after which the concept was read as asked.
        retained: share of the corrected cells that are read rightly at the end of the stream.
        prequential: accuracy on concepts before each reveal; `without` is the same model's without any correction.
        held_out_before, held_out_after: accuracy on concepts of the held-out rows; `label_…` on the task.
        generality_before, generality_after: on siblings of corrected cells with the same gold class, share read
            rightly.
        locality: of siblings with another gold class that were read rightly, the share that still is.
        others_changed: share of readings of *other* concepts of corrected reviews that the corrections changed.
        changed: median of the changed numbers of the model, an edit.
        seconds: median, an edit, without the first of each shape, which compiles.
    """

    num_reviews: int
    num_edits: int
    repaired: float
    retained: float
    prequential: float
    without: float
    held_out_before: float
    held_out_after: float
    label_before: float
    label_after: float
    generality_before: float
    generality_after: float
    locality: float
    others_changed: float
    changed: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, None for NaN."""
        found = dataclasses.asdict(self)
        return {name: None if value != value else value for name, value in found.items()}


def split_by_group(groups: Sequence[str], seed: int) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " B"]]:
    """Rows of two halves that share no group, in their order.

    >>> [half.tolist() for half in split_by_group(["a", "b", "a", "c"], 0)]
    [[0, 2], [1, 3]]
    """
    names = sorted(set(groups))
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]}
    is_first = np.array([group in chosen for group in groups], bool)
    return np.flatnonzero(is_first), np.flatnonzero(~is_first)


def predict_split(
    config: CBMConfig, state: ModelArrays, split: Tokenized, rows: Sequence[int] | Int[np.ndarray, " N"]
) -> SplitPredictions:
    """The model's readings of some rows of a split, in their order."""
    forward, size = make_forward(config), min(_BATCH, len(rows))
    ordered = np.asarray(rows)[np.argsort(split.lengths[np.asarray(rows)], kind="stable")]
    concepts: dict[int, Any] = {}
    labels: dict[int, Any] = {}
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        output = forward(state.params, state.masks, state.heads, batch_of(split, part, batch_size=size))
        concepts |= dict(zip(part.tolist(), np.asarray(output.concept_logits).argmax(-1), strict=False))
        labels |= dict(zip(part.tolist(), np.asarray(output.label_logits).argmax(-1), strict=False))
    return SplitPredictions(
        np.stack([concepts[int(row)] for row in rows]), np.array([labels[int(row)] for row in rows])
    )


def run_sequence(
    config: CBMConfig,
    state: ModelArrays,
    arm: Editor,
    split: Tokenized,
    groups: Sequence[str],
    *,
    max_edits: int,
    split_seed: int = 0,
    order_seed: int = 0,
    before: SplitPredictions | None = None,
    on_edit: Callable[[], object] = lambda: None,
) -> tuple[ModelArrays, SequentialReport]:
    """Corrects a stream of reviews by one arm; see `StreamReport`.

    Args:
        split: rows with gold concepts; missing cells are neither scored nor corrected.
        groups: of each row, the original that it is an edit of.
        max_edits: the stream ends with the review in which so many corrections have been made.
        split_seed: of the halves, stream and held-out.
        order_seed: of the order in which reviews come.
        before: how `state` reads all rows, where that is known.
        on_edit: called after each correction.

    Returns:
        The model at the end and the report.

    Raises:
        ValueError: if there are not as many groups as rows, or fewer than two groups.
    """
    if len(groups) != split.num_examples:
        raise ValueError(f"there are {len(groups)} groups, but {split.num_examples} rows; expected one for each")
    streamed, held_out = split_by_group(groups, split_seed)
    if not len(streamed) or not len(held_out):
        raise ValueError("all rows are of one group; expected at least two, one for each half")
    gold, start = split.concepts, state
    rows = [int(row) for row in np.random.default_rng(order_seed).permutation(streamed)]
    seen: list[int] = []
    cells: list[Cell] = []
    right: list[bool] = []
    repaired: list[bool] = []
    changed: list[int] = []
    seconds: dict[int, list[float]] = {}
    for row in rows:
        if len(cells) >= max_edits:
            break
        seen.append(row)
        batch = batch_of(split, [row])
        found = predict_split(config, state, split, [row]).concepts[0]
        labelled = np.flatnonzero(gold[row] >= 0)
        right += [bool(found[k] == gold[row, k]) for k in labelled]
        for k in (int(k) for k in labelled if found[k] != gold[row, k]):
            began = time.monotonic()
            outcome = arm(config, state, batch, k, int(gold[row, k]))
            state = jax.block_until_ready(outcome.state)
            seconds.setdefault(batch.input_ids.shape[1], []).append(time.monotonic() - began)
            cells.append(Cell(row, k))
            repaired.append(outcome.is_repaired)
            changed.append(outcome.num_changed)
            on_edit()
    all_rows = np.arange(split.num_examples)
    before = predict_split(config, start, split, all_rows) if before is None else before
    after = before if state is start else predict_split(config, state, split, all_rows)
    is_right_before, is_right = _is_right(before, gold), _is_right(after, gold)
    same, other = _siblings(cells, gold, groups)
    edited_rows = np.array(sorted({cell.row for cell in cells}), int)
    untouched = np.ones((len(edited_rows), gold.shape[1]), bool)
    for cell in cells:
        untouched[np.searchsorted(edited_rows, cell.row), cell.concept] = False
    flipped = (before.concepts != after.concepts)[edited_rows]
    return state, SequentialReport(
        num_reviews=len(seen),
        num_edits=len(cells),
        repaired=_mean(repaired),
        retained=_mean([is_right[cell] for cell in cells]),
        prequential=_mean(right),
        without=_mean(is_right_before[seen][gold[seen] >= 0]),
        held_out_before=_mean(is_right_before[held_out][gold[held_out] >= 0]),
        held_out_after=_mean(is_right[held_out][gold[held_out] >= 0]),
        label_before=_label_accuracy(before, split, held_out),
        label_after=_label_accuracy(after, split, held_out),
        generality_before=_mean([is_right_before[cell] for cell in same]),
        generality_after=_mean([is_right[cell] for cell in same]),
        locality=_mean([is_right[cell] for cell in other if is_right_before[cell]]),
        others_changed=_mean(flipped[untouched]),
        changed=float(np.median(changed)) if changed else float("nan"),
        seconds=_median_seconds(seconds),
    )


def _is_right(readings: SplitPredictions, gold: Int[np.ndarray, "N K"]) -> Bool[np.ndarray, "N K"]:
    return readings.concepts == gold


def _label_accuracy(readings: SplitPredictions, split: Tokenized, rows: Int[np.ndarray, " n"]) -> float:
    labelled = rows[split.labels[rows] >= 0]
    return _mean(readings.labels[labelled] == split.labels[labelled])


def _siblings(
    cells: Sequence[Cell], gold: Int[np.ndarray, "N K"], groups: Sequence[str]
) -> tuple[list[Cell], list[Cell]]:
    """Cells of the same concept in other rows of a corrected row's group, with its gold class and with another.

    A row that was corrected itself is left out.
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    corrected, same, other = set(cells), dict[Cell, None](), dict[Cell, None]()
    for cell in cells:
        for row in members[groups[cell.row]]:
            sibling = Cell(row, cell.concept)
            if sibling not in corrected and gold[sibling] >= 0:
                (same if gold[sibling] == gold[cell] else other)[sibling] = None
    return list(same), list(other)


def _mean(values: Sequence[Any] | Bool[np.ndarray, " n"] | Float[np.ndarray, " n"]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _median_seconds(by_width: dict[int, list[float]]) -> float:
    warm = [second for seconds in by_width.values() for second in seconds[1:]]
    return float(np.median(warm)) if warm else float("nan")
