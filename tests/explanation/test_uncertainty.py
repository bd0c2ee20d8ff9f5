"""Predictions that the model is unsure of."""

import numpy as np
import pytest

from sparsecbm_jax.explanation import unsure_predictions
from sparsecbm_jax.model.predictions import Predictions

from tests.support.tiny_model import SCHEMA


def test_unsure_predictions_are_found_without_a_label() -> None:
    concepts = np.array([[[0.5, 0.4, 0.1], [0.98, 0.01, 0.01], [0.32, 0.3, 0.38]]] * 2)
    concepts[1] = [0.0, 1.0, 0.0]
    predictions = Predictions(
        concepts, np.zeros((2, 2)), concepts.argmax(-1), np.zeros(2, int), np.zeros((2, 2), bool), np.zeros(2, bool)
    )
    found = unsure_predictions(predictions, SCHEMA, max_margin=0.11)
    assert [(one.row, one.concept, one.prediction, one.runner_up) for one in found] == [
        (0, "service", "unknown", "Negative"),
        (0, "food", "Negative", "Positive"),
    ]
    assert found[1].margin == pytest.approx(0.1)
    assert found[1].entropy == pytest.approx(-(0.5 * np.log(0.5) + 0.4 * np.log(0.4) + 0.1 * np.log(0.1)))
    assert unsure_predictions(predictions, SCHEMA, min_entropy=1.0) == found[:1]
    assert not unsure_predictions(predictions, SCHEMA, max_margin=0.0)
    with pytest.raises(ValueError, match="expected at least one threshold"):
        unsure_predictions(predictions, SCHEMA)
