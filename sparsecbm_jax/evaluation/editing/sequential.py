"""Sequential editing: corrections one after another, all of them kept. What they repair, cost, and teach.

A review comes, the model predicts it and is scored; then its gold concepts are revealed, and every concept that was
predicted incorrectly is corrected by one editor. The headline is the accuracy *before* the reveal, which can fall.
After the sequence the model is scored on reviews that share no original with the corrected ones, on the corrected cells
themselves, and on the siblings of corrected reviews: edits of one original text, some of which change the concept.

Reference: the protocol is prequential evaluation (Dawid 1984); siblings are those of CEBaB (Abraham et al. 2022).
Deviation: the paper picks the wrong predictions by their gold labels and scores those alone, which cannot lose.
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
    """What a sequence of corrections did; shares are of 1, and NaN where there is nothing to count.

    Attributes:
        num_reviews, num_edits: reviews that came, and concepts that were corrected.
        repaired: share of the corrections after which the concept was predicted as asked.
        retained: share of the corrected cells that are predicted correctly at the end.
        prequential: accuracy on concepts before each reveal; `without` is the same model's without any correction.
        held_out_before, held_out_after: accuracy on concepts of the held-out rows; `label_…` on the task.
        generality_before, generality_after: on siblings of corrected cells with the same gold class, share predicted
            correctly.
        locality: of siblings with another gold class that were predicted correctly, the share that still is.
        others_changed: share of predictions of *other* concepts of corrected reviews that the corrections changed.
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


class _Corrected(NamedTuple):
    """What a sequence of corrections leaves.

    Attributes:
        arrays: the model at the end.
        rows: rows that came, in their order.
        cells: the corrected ones, in their order.
        is_right: of each labelled cell that came, whether it was predicted correctly before its correction.
        outcomes: of each correction.
        widths: of each correction's batch, for which programs are compiled.
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
    """Corrects reviews one after another by one editor, and says what came of it; see `SequentialReport`.

    Args:
        subject: the model, and rows with gold concepts; missing cells are neither scored nor corrected.
        editor: makes the corrections; it is given those before, too.
        max_edits: the sequence ends with the review in which so many corrections have been made.
        split_seed: of the halves, corrected and held-out.
        order_seed: of the order in which reviews come.
        on_edit: called after each correction.

    Returns:
        The model at the end and the report.

    Raises:
        ValueError: if there are not as many groups as rows, or fewer than two groups.
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
            # The arrays of every step would fill the memory.
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
    """Of corrected rows, which predictions of concepts that were not corrected changed."""
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


def median_warm(seconds: Iterable[tuple[int, float]]) -> float:
    """The median of (width, seconds) without the first of each width, which compiles; NaN where nothing is left."""
    seen: set[int] = set()
    warm = []
    for width, took in seconds:
        if width in seen:
            warm.append(took)
        seen.add(width)
    return float(np.median(warm)) if warm else float("nan")
