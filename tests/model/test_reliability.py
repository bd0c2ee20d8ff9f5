"""Thresholds accept no more than the risk that is asked for; guesses are told; of old models nothing is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sparsecbm_jax.explanation.as_text import render_text, top_words
from sparsecbm_jax.explanation.pathways import explain
from sparsecbm_jax.model.predictions import predict
from sparsecbm_jax.model.reliability import Reliability, is_guess, measure_reliability, threshold
from sparsecbm_jax.model.sparse_cbm import SparseCBM

from tests.support.tiny_model import TEXTS, tiny_model


def texts(num: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that mean what they say, and gold classes."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([0.5, 0.5, 0.5], num)
    return probabilities, np.array([rng.choice(3, p=row) for row in probabilities])


@pytest.mark.parametrize("risk", [0.02, 0.1, 0.2])
def test_a_threshold_accepts_the_most_that_the_risk_allows(risk: float) -> None:
    probabilities, gold = texts()
    found = threshold(probabilities, gold, risk)
    surest, is_wrong = probabilities.max(1), probabilities.argmax(1) != gold
    assert is_wrong[surest >= found].mean() <= risk
    lower = np.sort(np.unique(surest[surest < found]))
    assert all(is_wrong[surest >= value].mean() > risk for value in lower)


def test_limits_of_the_threshold() -> None:
    probabilities, gold = texts()
    assert threshold(probabilities, gold, 1.0) == 0
    assert threshold(probabilities, (probabilities.argmax(1) + 1) % 3, 0.5) == 2, "nothing is right, all is unsure"
    assert threshold(probabilities[:19], gold[:19], 0.0) == 0, "of few labels nothing is known"
    assert threshold(probabilities, np.full(400, -1), 0.0) == 0
    equal = np.tile([0.6, 0.4, 0.0], (40, 1))
    assert threshold(equal, np.arange(40) % 2, 0.4) == 2, "texts of one probability stand together"


def test_a_guess_is_told_from_a_reading() -> None:
    probabilities, gold = texts()
    assert not is_guess(probabilities, gold)
    constant = np.tile([0.2, 0.7, 0.1], (400, 1))
    assert is_guess(constant, np.where(np.arange(400) % 5 < 3, 1, 0))
    assert not is_guess(constant[:10], np.zeros(10, int))


def test_what_is_measured_is_kept() -> None:
    probabilities, gold = texts()
    constant = np.tile([0.2, 0.7, 0.1], (400, 1))
    often = np.where(np.arange(400) % 5 < 3, 1, 0)
    both, golds = np.stack([probabilities, constant], 1), np.stack([gold, often], 1)
    found = measure_reliability(both, golds, probabilities, gold, 0.1)
    assert found.is_guess.tolist() == [False, True] and found.label_threshold == found.concept_thresholds[0] > 0.5
    model = with_reliability(found.to_metadata(), num_concepts=2)
    np.testing.assert_array_equal(model.reliability.concept_thresholds, found.concept_thresholds)
    assert with_reliability({}, num_concepts=2).reliability.label_threshold == 0
    for broken in ({"reliability": None}, {"reliability": {"is_guess": []}}):
        with pytest.raises(ValueError, match=r"metadata.reliability is not what a model keeps"):
            _ = with_reliability(broken, num_concepts=2).reliability
    with pytest.raises(ValueError, match=r"metadata.reliability is not of 3 concepts"):
        _ = with_reliability(found.to_metadata(), num_concepts=3).reliability


def with_reliability(metadata: dict[str, Any], num_concepts: int = 3) -> SparseCBM:
    model = tiny_model(num_layers=1)
    config = dataclasses.replace(model.config, num_concepts=num_concepts)
    return dataclasses.replace(model, config=config, metadata=metadata)


def test_doubts_are_shown() -> None:
    known = Reliability(np.array([2.0, 0.0, 0.0]), np.array([False, False, True]), 2.0)
    model = with_reliability(known.to_metadata())
    predicted = predict(model, TEXTS)
    assert predicted.is_unsure.tolist() == [[True, False, False]] * len(TEXTS) and predicted.is_label_unsure.all()
    (pathway,) = explain(model, TEXTS[:1])
    assert pathway.is_unsure
    assert [(lane.is_unsure, lane.is_guess) for lane in pathway.concepts] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    lines = render_text(pathway).split("\n")
    assert lines[1].endswith("(not sure)") and lines[4].endswith("(not sure)")
    assert lines[8].endswith("(read no better than by guessing)")
    standard = predict(tiny_model(num_layers=1, strategy="standard"), TEXTS)
    assert standard.is_unsure.shape == (len(TEXTS), 0)


def test_a_concept_of_which_nothing_is_said_has_no_words() -> None:
    model, asked = tiny_model(num_layers=1), None
    for pathway in explain(model, TEXTS):
        for lane in pathway.concepts:
            is_unknown = lane.predicted_class == "unknown"
            assert lane.shows_words != is_unknown and bool(top_words(pathway, lane, 3)) != is_unknown
            asked = (pathway.text, lane.name) if is_unknown else asked
    assert asked is not None
    text, name = asked
    for wanted in ("predicted", "Positive"):
        (pathway,) = explain(model, [text], {name: wanted})
        lane = next(lane for lane in pathway.concepts if lane.name == name)
        assert lane.shows_words and top_words(pathway, lane, 3)
        assert lane.explained_class == ("unknown" if wanted == "predicted" else wanted)
    assert "no words, since it is read as unknown" in render_text(explain(model, [text])[0])
