"""What corrections repair and what they cost, measured in ways that can come out badly.

Three parts. *Undone* is the paper's Figure 3: gold labels pick the wrong cells, each row is corrected from the original
masks, read again, and the edit undone; beside it stands what one such edit does to rows that it was not made for.
*Minimal* looks for the smallest edit of every wrong cell. *Streams* (`streams.run_stream`) keep corrections in force,
arm by arm (`named_arms`).

Deviation: the paper reports the first figure alone. It cannot lose: a cell that is read rightly is never touched.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from sparsecbm_jax.data.batches import Tokenized, batch_of
from sparsecbm_jax.evaluation.editing.baselines import oracle_activations
from sparsecbm_jax.evaluation.editing.sequential import Cell, SplitPredictions, predict_split
from sparsecbm_jax.intervention.editors import Editor
from sparsecbm_jax.intervention.minimal_edit import minimal_edit
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model and the rows that it is corrected on.

    Attributes:
        config, state: the model before any correction.
        split: rows with gold concepts.
        groups: of each row, the original that it is an edit of.
    """

    config: CBMConfig
    state: ModelArrays
    split: Tokenized
    groups: Sequence[str]

    @functools.cached_property
    def readings(self) -> SplitPredictions:
        """Of all rows, before any correction."""
        return predict_split(self.config, self.state, self.split, np.arange(self.split.num_examples))

    @property
    def wrong(self) -> Bool[np.ndarray, "N K"]:
        """Labelled cells that are read wrongly."""
        return (self.readings.concepts != self.split.concepts) & (self.split.concepts >= 0)

    def wrong_of(self, row: int) -> list[int]:
        """The concepts of a row that are read wrongly."""
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
            raise ValueError("every labelled concept of the split is read rightly; there is nothing to correct")
        fitting = int(np.sum(np.cumsum(counts[rows]) <= max_cells)) if max_cells else len(rows)
        return [int(row) for row in rows[: max(fitting, 1)]]

    def draw_held_out(self, edited: Sequence[int], num_rows: int, seed: int) -> list[int]:
        """At most `num_rows` rows that share no original with the edited ones; all of those where it is 0."""
        taken = {self.groups[row] for row in edited}
        rest = [row for row, group in enumerate(self.groups) if group not in taken]
        chosen = np.random.default_rng(seed).permutation(len(rest))[: num_rows or None]
        return [rest[i] for i in sorted(chosen)]


def single_edits(
    subject: Subject,
    arm: Editor,
    rows: Sequence[int],
    held_out: Sequence[int],
    *,
    num_side_edits: int,
    on_edit: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Corrects every wrong cell of some rows from the original masks; each row's edits are undone before the next.

    Args:
        rows: rows with wrong cells, as `Subject.draw` gives them.
        held_out: rows that share no original with the first `num_side_edits` of `rows`; may be none.
        num_side_edits: of so many rows the first edit is tried on the held-out rows, too.
        on_edit: called after each correction.

    Returns:
        `repaired`, of `num_cells`; `concept` and `task`, accuracies on the whole split where all wrong cells were
            treated
        as these; `changed` and `seconds`, medians of an edit, without the first of a width, which compiles; `side`, of
        each tried edit the accuracies of the edited concept and of the task on the held-out rows, before and after.
            None
        where there is nothing to count.
    """
    config, split = subject.config, subject.split
    repaired: list[bool] = []
    changed: list[int] = []
    is_right: dict[int, bool] = {}
    side: list[dict[str, float | None]] = []
    seconds: dict[int, list[float]] = {}
    for row in rows:
        state, batch = subject.state, batch_of(split, [row])
        for number, k in enumerate(subject.wrong_of(row)):
            began = time.monotonic()
            outcome = arm(config, state, batch, k, int(split.concepts[row, k]))
            state = jax.block_until_ready(outcome.state)
            seconds.setdefault(batch.input_ids.shape[1], []).append(time.monotonic() - began)
            repaired.append(outcome.is_repaired)
            changed.append(outcome.num_changed)
            if held_out and not number and len(side) < num_side_edits:
                side.append(_side_effect(subject, state, held_out, k))
            on_edit()
        if split.labels[row] >= 0:
            is_right[row] = bool(predict_split(config, state, split, [row]).labels[0] == split.labels[row])
    warm = [second for of_width in seconds.values() for second in of_width[1:]]
    return {
        "num_cells": len(repaired),
        "repaired": _mean(repaired),
        "concept": 1 - subject.wrong.sum() / (split.concepts >= 0).sum() * (1 - np.mean(repaired)),
        "task": _task(subject, is_right),
        "changed": float(np.median(changed)),
        "seconds": float(np.median(warm)) if warm else None,
        "side": side,
    }


def oracle(subject: Subject, rows: Sequence[int]) -> dict[str, Any]:
    """The task's accuracy, as in `undone`, where the activations of wrong cells are set by hand.

    The concepts are right then by definition, so that there is no accuracy to speak of.

    Reference: Koh et al. 2020, 'Concept Bottleneck Models', test-time intervention.
    """
    forward, split, heads = make_forward(subject.config), subject.split, subject.state.heads
    is_right: dict[int, bool] = {}
    for row in (row for row in rows if split.labels[row] >= 0):
        output = forward(*subject.state, batch_of(split, [row]))
        activations, label = output.activations, output.label_logits
        for k in subject.wrong_of(row):
            activations, label = oracle_activations(heads, activations, k, int(split.concepts[row, k]))
        is_right[row] = bool(np.argmax(np.asarray(label)[0]) == split.labels[row])
    return {"task": _task(subject, is_right)}


def minimal_edits(subject: Subject, cells: Iterable[Cell], max_pairs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """The smallest edit of each cell, from the original masks.

    Returns:
        The cells, each with `is_repaired`, `changed` (weights dropped and grown), `margin`, `margin_below` (with a pair
        less; None where there is none), `num_trials` and `seconds` (None for the first of a width, which compiles).
    """
    widths: set[int] = set()
    for cell in cells:
        batch = batch_of(subject.split, [cell.row])
        target = int(subject.split.concepts[cell])
        began = time.monotonic()
        arrays = (subject.config, *subject.state, batch, cell.concept, target)
        found = jax.block_until_ready(minimal_edit(*arrays, max_pairs=max_pairs)[1])
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
    """Of smallest edits, what share repairs, and quantiles of changed weights among those that do.

    Args:
        found: results of `minimal_edits`.
        num_weights: of the backbone, maskable.
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


def _side_effect(subject: Subject, state: ModelArrays, rows: Sequence[int], k: int) -> dict[str, float | None]:
    after, before, split = predict_split(subject.config, state, subject.split, rows), subject.readings, subject.split
    gold, labels = split.concepts[rows, k], split.labels[rows]
    is_cell, is_label = gold >= 0, labels >= 0

    def right(found: Int[np.ndarray, " n"], wanted: Int[np.ndarray, " n"], among: Bool[np.ndarray, " n"]) -> Any:
        return _mean((found == wanted)[among])

    return {
        "concept_before": right(before.concepts[rows, k], gold, is_cell),
        "concept_after": right(after.concepts[:, k], gold, is_cell),
        "task_before": right(before.labels[rows], labels, is_label),
        "task_after": right(after.labels, labels, is_label),
    }


def _task(subject: Subject, is_right: Mapping[int, bool]) -> float | None:
    """The accuracy on the split where all labelled rows with wrong cells fare as those that were drawn.

    Rows that were right before and rows that were not are counted apart: which of them were drawn is chance, and
    without an edit nothing is to change.

    Args:
        is_right: of the drawn rows, whether the label is right now.
    """
    labels, before = subject.split.labels, subject.readings.labels == subject.split.labels
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
