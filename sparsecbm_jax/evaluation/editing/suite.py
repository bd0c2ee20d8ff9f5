"""The intervention suite: gains and costs of corrections, by measures that can also show losses.

It has three parts. *Single edits* are the paper's Figure 3: gold labels select the wrong cells, each row is corrected
from the original masks and predicted again. The effect of one such edit on other rows is measured, too. *Minimal edits*
are the smallest edits of every wrong cell. In *sequential editing* (`sequential.run_sequence`) all corrections stay
active; it compares editors (`named_editors`).

Deviation: the paper reports the first part alone. Its accuracy cannot fall: a cell that is correct is never corrected.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from sparsecbm_jax.data.batches import batch_of
from sparsecbm_jax.evaluation.editing.baselines import oracle_activations
from sparsecbm_jax.evaluation.editing.sequential import median_warm
from sparsecbm_jax.evaluation.editing.subject import Cell, Outcome, Subject, measure, predict_split
from sparsecbm_jax.intervention.editors import Editor
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection
from sparsecbm_jax.intervention.minimal_edit import minimal_edit
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def single_edits(
    subject: Subject,
    editor: Editor,
    rows: Sequence[int],
    held_out: Sequence[int],
    *,
    num_side_edits: int,
    on_edit: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Corrects every wrong cell of some rows; each row starts from the original masks.

    Args:
        subject: The model and its rows.
        editor: The editor that makes the corrections.
        rows: Rows with wrong cells, from `Subject.draw`.
        held_out: Rows that share no original with the first `num_side_edits` of `rows`; may be empty.
        num_side_edits: Number of rows whose first edit is also tried on the held-out rows.
        on_edit: Called after each correction.

    Returns:
        `repaired`, a share of `num_cells`; `concept` and `task`, accuracies on the whole split if all wrong cells fare
        as these; `changed` and `seconds`, medians over edits, without the first of a width, which compiles; `side`, for
        each tried edit the accuracies of the edited concept and of the task on the held-out rows, before and after.
        None where there is nothing to count.
    """
    config, split = subject.config, subject.split
    outcomes: list[Outcome] = []
    widths: list[int] = []
    is_right: dict[int, bool] = {}
    side: list[dict[str, float | None]] = []
    for row in rows:
        arrays, batch = subject.arrays, batch_of(split, [row])
        for number, k in enumerate(subject.wrong_of(row)):
            outcome = measure(editor, config, arrays, ConceptCorrection(batch, k, int(split.concepts[row, k])))
            arrays = outcome.arrays
            outcomes.append(outcome._replace(arrays=subject.arrays))
            widths.append(batch.input_ids.shape[1])
            if held_out and not number and len(side) < num_side_edits:
                side.append(_side_effect(subject, arrays, held_out, k))
            on_edit()
        if split.labels[row] >= 0:
            is_right[row] = bool(predict_split(config, arrays, split, [row]).labels[0] == split.labels[row])
    repaired = [outcome.is_repaired for outcome in outcomes]
    return {
        "num_cells": len(repaired),
        "repaired": _mean(repaired),
        "concept": 1 - subject.wrong.sum() / (split.concepts >= 0).sum() * (1 - np.mean(repaired)),
        "task": _task(subject, is_right),
        "changed": float(np.median([outcome.num_changed for outcome in outcomes])),
        "seconds": _number(median_warm(zip(widths, (outcome.seconds for outcome in outcomes), strict=True))),
        "side": side,
    }


def oracle(subject: Subject, rows: Sequence[int]) -> dict[str, Any]:
    """Computes the task's accuracy, as in `single_edits`, if the activations of wrong cells are set by hand.

    The concepts are then correct by definition, so their accuracy is not reported.

    Args:
        subject: The model and its rows.
        rows: Rows with wrong cells, from `Subject.draw`.

    Reference: Koh et al. 2020, 'Concept Bottleneck Models', test-time intervention.
    """
    forward, split, heads = make_forward(subject.config), subject.split, subject.arrays.heads
    is_right: dict[int, bool] = {}
    for row in (row for row in rows if split.labels[row] >= 0):
        output = forward(subject.arrays, batch_of(split, [row]))
        activations, label = output.activations, output.label_logits
        for k in subject.wrong_of(row):
            values = subject.class_activations[k, int(split.concepts[row, k])]
            activations, label = oracle_activations(heads, activations, k, values)
        is_right[row] = bool(np.argmax(np.asarray(label)[0]) == split.labels[row])
    return {"task": _task(subject, is_right)}


def minimal_edits(subject: Subject, cells: Iterable[Cell], max_pairs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Finds the smallest edit of each cell, from the original masks.

    Args:
        subject: The model and its rows.
        cells: Wrong cells.
        max_pairs: Most pairs of weights that are tried, at least 1.

    Yields:
        The cells, each with `is_repaired`, `changed` (weights dropped and grown), `margin`, `margin_below` (with a pair
        less; None where there is none), `num_trials` and `seconds` (None for the first of a width, which compiles).
    """
    widths: set[int] = set()
    for cell in cells:
        batch = batch_of(subject.split, [cell.row])
        correction = ConceptCorrection(batch, cell.concept, int(subject.split.concepts[cell]))
        began = time.monotonic()
        found = minimal_edit(subject.config, subject.arrays, correction, max_pairs=max_pairs)[1]
        found = jax.block_until_ready(found)
        took, width = time.monotonic() - began, batch.input_ids.shape[1]
        yield (
            cell,
            {
                "is_repaired": bool(found.is_repaired),
                "changed": 2 * int(found.num_pairs),
                "margin": _number(found.margin),
                "margin_below": _number(found.margin_below),
                "num_trials": int(found.num_trials),
                "seconds": took if width in widths else None,
            },
        )
        widths.add(width)


def summarise_minimal(found: Sequence[Mapping[str, Any]], num_weights: int) -> dict[str, Any]:
    """Computes the share of smallest edits that repair, and quantiles of changed weights among those that do.

    Args:
        found: Results of `minimal_edits`.
        num_weights: Maskable weights of the backbone.
    """
    changed = [one["changed"] for one in found if one["is_repaired"]]
    seconds = [one["seconds"] for one in found if one["seconds"] is not None]
    counts: list[float | None] = [None] * len(QUANTILES)
    if changed:
        counts = [float(np.quantile(changed, q, method="higher")) for q in QUANTILES]
    return {
        "num_cells": len(found),
        "repaired": _mean([one["is_repaired"] for one in found]),
        "changed": dict(zip(map(str, QUANTILES), counts, strict=True)),
        "share": dict(zip(map(str, QUANTILES), (c if c is None else c / num_weights for c in counts), strict=True)),
        "seconds": float(np.median(seconds)) if seconds else None,
    }


def _side_effect(subject: Subject, arrays: ModelArrays, rows: Sequence[int], k: int) -> dict[str, float | None]:
    after, before, split = (
        predict_split(subject.config, arrays, subject.split, rows),
        subject.predictions,
        subject.split,
    )
    gold, labels = split.concepts[rows, k], split.labels[rows]
    is_cell, is_label = gold >= 0, labels >= 0

    def accuracy(found: Int[np.ndarray, " n"], true: Int[np.ndarray, " n"], among: Bool[np.ndarray, " n"]) -> Any:
        return _mean((found == true)[among])

    return {
        "concept_before": accuracy(before.concepts[rows, k], gold, is_cell),
        "concept_after": accuracy(after.concepts[:, k], gold, is_cell),
        "task_before": accuracy(before.labels[rows], labels, is_label),
        "task_after": accuracy(after.labels, labels, is_label),
    }


def _task(subject: Subject, is_right: Mapping[int, bool]) -> float | None:
    """Estimates the accuracy on the split if all labelled rows with wrong cells fare as those that were drawn.

    Rows whose label was correct before and rows whose label was not are counted apart: the draw mixes them by chance,
    and without an edit the accuracy must not change.

    Args:
        subject: The model and its rows.
        is_right: For each drawn row, True where the label is correct now.
    """
    labels, before = subject.split.labels, subject.predictions.labels == subject.split.labels
    is_labelled = labels >= 0
    if not is_labelled.any():
        return None
    right = float(before[is_labelled].sum())
    for was_right in (False, True):
        alike = is_labelled & subject.wrong.any(axis=1) & (before == was_right)
        drawn = [now for row, now in is_right.items() if alike[row]]
        if drawn:
            right += float(alike.sum() * (np.mean(drawn) - was_right))
    return float(right / is_labelled.sum())


def _mean(values: Sequence[Any] | Bool[np.ndarray, " n"]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
