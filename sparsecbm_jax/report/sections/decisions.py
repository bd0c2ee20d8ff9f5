"""A few held-out decisions of a model, chosen by a rule: the first correct, the first incorrect, the first mixed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sparsecbm_jax.data.schema import Examples
from sparsecbm_jax.data.words import printable
from sparsecbm_jax.explanation.pathways import explain
from sparsecbm_jax.model.predictions import predict
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.report.elements import Section, Table

# Rows of a chunk, and most rows that are read until all kinds are found.
_CHUNK, _MOST_ROWS = 64, 512
_SHOWN_CHARACTERS = 90


class _Row(NamedTuple):
    """Gold and predicted labels and classes of a row; gold is negative where it is missing."""

    label: int
    predicted_label: int
    classes: Int[np.ndarray, " K"]
    predicted_classes: Int[np.ndarray, " K"]

    @property
    def is_right(self) -> bool:
        is_read = (self.classes < 0) | (self.classes == self.predicted_classes)
        return self.label == self.predicted_label and bool(is_read.all())

    @property
    def is_wrong(self) -> bool:
        return self.label >= 0 and self.label != self.predicted_label

    def is_mixed(self, unknown: int | None) -> bool:
        return len({int(value) for value in self.classes if value >= 0 and value != unknown}) > 1


def gallery_section(model: SparseCBM, examples: Examples) -> Section | None:
    """Shows the first held-out texts that are predicted correctly, that get a wrong label, that hold mixed concepts.

    Args:
        model: A model with concepts.
        examples: Held-out texts with their labels.

    Returns:
        The section with their pathways; None where none of the first rows is of these kinds.
    """
    model = model.for_few_texts()
    unknown = model.schema.unknown_class
    kinds: dict[str, Callable[[_Row], bool]] = {
        "all correct": lambda row: row.is_right,
        "wrong label": lambda row: row.is_wrong,
        "mixed concepts": lambda row: row.is_mixed(unknown),
    }
    found: dict[str, tuple[int, _Row]] = {}
    num_rows = min(len(examples.texts), _MOST_ROWS)
    for start in range(0, num_rows, _CHUNK):
        stop = min(start + _CHUNK, num_rows)
        predicted = predict(model, examples.texts[start:stop])
        for n, label, classes in zip(range(start, stop), predicted.labels, predicted.concepts, strict=True):
            row = _Row(int(examples.labels[n]), int(label), examples.concepts[n], classes)
            kind = next((name for name, fits in kinds.items() if name not in found and fits(row)), None)
            if kind is not None:
                found[kind] = (n, row)
        if len(found) == len(kinds):
            break
    if not found:
        return None
    shown = {kind: found[kind] for kind in kinds if kind in found}
    schema, rows = model.schema, []
    for kind, (n, row) in shown.items():
        classes = [
            _gold_and_predicted(schema.classes, int(gold), int(predicted))
            for gold, predicted in zip(row.classes, row.predicted_classes, strict=True)
        ]
        text = printable(examples.texts[n], _SHOWN_CHARACTERS)
        rows.append([kind, text, _gold_and_predicted(schema.labels, row.label, row.predicted_label), *classes])
    words = (
        "The first rows of the test split that are of each kind: label and all concepts correct; label wrong; and gold "
        "classes of more than one kind among the concepts. No review was chosen by hand."
    )
    if absent := [kind for kind in kinds if kind not in found]:
        words += f" None of the first {num_rows} rows: {', '.join(absent)}."
    table = Table(
        "Predictions for the reviews; where the gold class is another, “not” names it",
        ["kind", "text", "label", *schema.concepts],
        rows,
        is_words=True,
    )
    pathways = explain(model, [examples.texts[n] for n, _ in shown.values()])
    return Section("Decisions", [words], [], [table], pathways)


def _gold_and_predicted(names: tuple[str, ...], gold: int, predicted: int) -> str:
    if gold < 0:
        return f"{names[predicted]} (no gold)"
    return names[gold] if gold == predicted else f"{names[predicted]}, not {names[gold]}"
