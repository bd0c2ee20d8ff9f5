"""Predictions that are worth a person's look, found without any label."""

from typing import NamedTuple

import numpy as np

from sparsecbm_jax.data.schema import Schema
from sparsecbm_jax.model.predictions import Predictions


class UnsurePrediction(NamedTuple):
    """A concept of a text that the model is unsure of.

    Attributes:
        row: index of the text.
        concept: its name.
        prediction, runner_up: the two most probable classes.
        margin: difference of their probabilities.
        entropy: of all classes, in nats.
    """

    row: int
    concept: str
    prediction: str
    runner_up: str
    margin: float
    entropy: float


def unsure_predictions(
    predictions: Predictions, schema: Schema, *, max_margin: float | None = None, min_entropy: float | None = None
) -> list[UnsurePrediction]:
    """Find the predicted concepts that the model is least sure of, the least sure first; nothing is corrected.

    Args:
        predictions: of `model.predictions.predict`.
        schema: the model's names.
        max_margin: takes predictions whose two best classes are closer than this, in probability.
        min_entropy: takes predictions whose entropy, in nats, is above this. With both, one of them is enough.

    Raises:
        ValueError: if neither is given.
    """
    if max_margin is None and min_entropy is None:
        raise ValueError("max_margin and min_entropy are both None; expected at least one threshold")
    probabilities = np.asarray(predictions.concept_probabilities, np.float64)
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=-1)
    margins = ranked[..., 0] - ranked[..., 1]
    entropies = -np.sum(probabilities * np.log(np.maximum(probabilities, np.finfo(float).tiny)), axis=-1)
    is_unsure = np.zeros(margins.shape, bool)
    if max_margin is not None:
        is_unsure |= margins < max_margin
    if min_entropy is not None:
        is_unsure |= entropies > min_entropy
    found = [
        UnsurePrediction(
            row=int(n),
            concept=schema.concepts[k],
            prediction=schema.classes[order[n, k, 0]],
            runner_up=schema.classes[order[n, k, 1]],
            margin=float(margins[n, k]),
            entropy=float(entropies[n, k]),
        )
        for n, k in np.argwhere(is_unsure)
    ]
    return sorted(found, key=lambda one: one.margin)
