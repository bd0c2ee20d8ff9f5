"""Sequential editing: corrections one after another, all of them active. Their repairs, costs, and generalisation.

The model predicts a review and is scored. Then the review's gold concepts are revealed, and one editor corrects every
concept that was predicted incorrectly. The main score is the accuracy *before* the reveal, which can fall. After the
sequence the model is scored on reviews that share no original with the corrected ones, on the corrected cells
themselves, and on the siblings of corrected reviews: edits of one original text, some of which change the concept.

Reference: the protocol is prequential evaluation (Dawid 1984); siblings are those of CEBaB (Abraham et al. 2022).
Deviation: the paper selects the wrong predictions by their gold labels and scores those alone, which cannot fall.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sparsecbm_jax.data.batches import Tokenized, batch_of
from sparsecbm_jax.evaluation.editing.subject import Cell, Outcome, SplitPredictions, Subject, measure, predict_split
from sparsecbm_jax.intervention.editors import Editor
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection
from sparsecbm_jax.model.sparse_cbm import ModelArrays


@dataclasses.dataclass(frozen=True)
class SequentialReport:
    """The scores of a sequence of corrections; shares lie in [0, 1], and are NaN where there is nothing to count.

    Attributes:
        num_reviews, num_edits: Numbers of reviews in the sequence, and of corrected concepts.
        repaired: Share of the corrections after which the concept had the requested class.
        retained: Share of the corrected cells that are predicted correctly at the end.
        prequential: Accuracy on concepts before each reveal; `without` is that of the model without any correction.
        held_out_before, held_out_after: Accuracy on concepts of the held-out rows; `label_…` on the task.
        generality_before, generality_after: Share of siblings of corrected cells with the same gold class that are
            predicted correctly.
        locality: Of siblings with another gold class that were predicted correctly, the share that still is.
        others_changed: Share of predictions of *other* concepts of corrected reviews that the corrections changed.
        changed: Median over edits of the changed numbers of the model.
        seconds: Median over edits, without the first of each shape, which compiles.
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
        """Returns plain data for JSON, None for NaN."""
        found = dataclasses.asdict(self)
        return {name: None if value != value else value for name, value in found.items()}


def split_by_group(groups: Sequence[str], seed: int) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " B"]]:
    """Splits rows into two halves that share no group; returns the rows of each in their order.

    >>> [half.tolist() for half in split_by_group(["a", "b", "a", "c"], 0)]
    [[0, 2], [1, 3]]
    """
    names = sorted(set(groups))
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]}
    is_first = np.array([group in chosen for group in groups], bool)
    return np.flatnonzero(is_first), np.flatnonzero(~is_first)


class _Corrected(NamedTuple):
    """The state at the end of a sequence of corrections.

    Attributes:
        arrays: The model's arrays.
        rows: Rows of the sequence, in their order.
        cells: Corrected cells, in their order.
        is_right: For each labelled cell of these rows, True where it was predicted correctly before its correction.
        outcomes: Outcome of each correction.
        widths: Width of each correction's batch, for which programs are compiled.
    """

    arrays: ModelArrays
    rows: list[int]
    cells: list[Cell]
    is_right: list[bool]
    outcomes: list[Outcome]
    widths: list[int]


def run_sequence(
    subject: Subject,
    editor: Editor,
    *,
    max_edits: int,
    split_seed: int = 0,
    order_seed: int = 0,
    on_edit: Callable[[], object] = lambda: None,
) -> tuple[ModelArrays, SequentialReport]:
    """Corrects reviews one after another by one editor, and scores the result; see `SequentialReport`.

    Args:
        subject: The model, and rows with gold concepts; missing cells are neither scored nor corrected.
        editor: The editor that makes the corrections; it also receives the earlier ones.
        max_edits: Number of corrections after which the sequence ends, with the review that reaches it.
        split_seed: Seed of the two halves, corrected and held-out.
        order_seed: Seed of the order of reviews.
        on_edit: Called after each correction.

    Returns:
        The model's arrays at the end, and the report.

    Raises:
        ValueError: There are not as many groups as rows, or fewer than two groups.
    """
    split, groups = subject.split, subject.groups
    if len(groups) != split.num_examples:
        raise ValueError(f"there are {len(groups)} groups, but {split.num_examples} rows; expected one for each")
    coming, held_out = split_by_group(groups, split_seed)
    if not len(coming) or not len(held_out):
        raise ValueError("all rows are of one group; expected at least two, one for each half")
    rows = [int(row) for row in np.random.default_rng(order_seed).permutation(coming)]
    done = _correct_in_turn(subject, editor, rows, max_edits, on_edit)
    return done.arrays, _report(subject, done, held_out)


def _correct_in_turn(
    subject: Subject, editor: Editor, rows: Sequence[int], max_edits: int, on_edit: Callable[[], object]
) -> _Corrected:
    config, split, gold = subject.config, subject.split, subject.split.concepts
    done = _Corrected(subject.arrays, [], [], [], [], [])
    earlier: list[ConceptCorrection] = []
    for row in rows:
        if len(done.cells) >= max_edits:
            break
        done.rows.append(row)
        batch = batch_of(split, [row])
        found = predict_split(config, done.arrays, split, [row]).concepts[0]
        labelled = np.flatnonzero(gold[row] >= 0)
        done.is_right.extend(bool(found[k] == gold[row, k]) for k in labelled)
        for k in (int(k) for k in labelled if found[k] != gold[row, k]):
            correction = ConceptCorrection(batch, k, int(gold[row, k]))
            outcome = measure(editor, config, done.arrays, correction._replace(earlier=tuple(earlier)))
            earlier.append(correction)
            done = done._replace(arrays=outcome.arrays)
            done.cells.append(Cell(row, k))
            # Without this, the arrays of every step would stay in memory.
            done.outcomes.append(outcome._replace(arrays=subject.arrays))
            done.widths.append(batch.input_ids.shape[1])
            on_edit()
    return done


def _report(subject: Subject, done: _Corrected, held_out: Int[np.ndarray, " B"]) -> SequentialReport:
    split, gold, cells = subject.split, subject.split.concepts, done.cells
    before = subject.predictions
    is_same = done.arrays is subject.arrays
    after = before if is_same else predict_split(subject.config, done.arrays, split, np.arange(split.num_examples))
    is_right_before, is_right = before.concepts == gold, after.concepts == gold
    same, other = _siblings(cells, gold, subject.groups)
    changed = [outcome.num_changed for outcome in done.outcomes]
    return SequentialReport(
        num_reviews=len(done.rows),
        num_edits=len(cells),
        repaired=_mean([outcome.is_repaired for outcome in done.outcomes]),
        retained=_mean([is_right[cell] for cell in cells]),
        prequential=_mean(done.is_right),
        without=_mean(is_right_before[done.rows][gold[done.rows] >= 0]),
        held_out_before=_mean(is_right_before[held_out][gold[held_out] >= 0]),
        held_out_after=_mean(is_right[held_out][gold[held_out] >= 0]),
        label_before=_label_accuracy(before, split, held_out),
        label_after=_label_accuracy(after, split, held_out),
        generality_before=_mean([is_right_before[cell] for cell in same]),
        generality_after=_mean([is_right[cell] for cell in same]),
        locality=_mean([is_right[cell] for cell in other if is_right_before[cell]]),
        others_changed=_mean(_others_changed(cells, before.concepts != after.concepts)),
        changed=float(np.median(changed)) if changed else float("nan"),
        seconds=median_warm(zip(done.widths, (outcome.seconds for outcome in done.outcomes), strict=True)),
    )


def _others_changed(cells: Sequence[Cell], is_flipped: Bool[np.ndarray, "N K"]) -> Bool[np.ndarray, " n"]:
    """Marks, for corrected rows, the changed predictions of concepts that were not corrected."""
    edited_rows = np.array(sorted({cell.row for cell in cells}), int)
    untouched = np.ones((len(edited_rows), is_flipped.shape[1]), bool)
    for cell in cells:
        untouched[np.searchsorted(edited_rows, cell.row), cell.concept] = False
    return is_flipped[edited_rows][untouched]


def _label_accuracy(predictions: SplitPredictions, split: Tokenized, rows: Int[np.ndarray, " n"]) -> float:
    labelled = rows[split.labels[rows] >= 0]
    return _mean(predictions.labels[labelled] == split.labels[labelled])


def _siblings(
    cells: Sequence[Cell], gold: Int[np.ndarray, "N K"], groups: Sequence[str]
) -> tuple[list[Cell], list[Cell]]:
    """Returns cells of the same concept in other rows of a corrected row's group, with its gold class and with another.

    Rows that were corrected themselves are left out.
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


def median_warm(seconds: Iterable[tuple[int, float]]) -> float:
    """Computes the median of the seconds without the first of each width, which compiles; NaN where none is left.

    Args:
        seconds: Pairs (width, seconds) in order of time.
    """
    seen: set[int] = set()
    warm = []
    for width, took in seconds:
        if width in seen:
            warm.append(took)
        seen.add(width)
    return float(np.median(warm)) if warm else float("nan")
