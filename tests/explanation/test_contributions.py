"""Contributions add up to the logit, count from the average text, and do not see what changes no probability."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sparsecbm_jax.explanation.contributions import (
    LabelParts,
    expected_label,
    label_effects,
    label_parts,
    label_values,
    reference_of,
    set_contributions,
)
from sparsecbm_jax.explanation.pathways import explain
from sparsecbm_jax.model.mean_activations import MeanActivations, mean_activations
from sparsecbm_jax.model.predictions import predict
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.report.page import predictor_weights

from tests.support.tiny_model import TEXTS, tiny_model

CLOSE = 1e-5


def with_metadata(model: SparseCBM, metadata: dict[str, Any]) -> SparseCBM:
    return dataclasses.replace(model, metadata=metadata)


def with_activation(model: SparseCBM, form: str) -> SparseCBM:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, activation=form))


@pytest.mark.parametrize("form", ["log_odds", "centred", "sigmoid"])
@pytest.mark.parametrize("strategy", ["sparse", "joint", "sequential", "independent"])
def test_base_and_contributions_are_the_centred_logit(form: str, strategy: str) -> None:
    model = with_activation(tiny_model(num_layers=1, strategy=strategy), form)
    predicted = predict(model, TEXTS)
    log_p = np.log(predicted.label_probabilities)
    for n, pathway in enumerate(explain(model, TEXTS)):
        assert pathway.reference == "mean"
        wanted = log_p[n] - log_p[n].mean()
        for j, label in enumerate(model.schema.labels):
            total = pathway.base[label] + sum(lane.contributions[label] for lane in pathway.concepts)
            assert total == pytest.approx(pathway.label_logits[label]) == pytest.approx(wanted[j], abs=CLOSE)
        for lane in pathway.concepts:
            assert sum(lane.contributions.values()) == pytest.approx(0, abs=CLOSE)


def test_a_concept_at_its_mean_contributes_nothing() -> None:
    model = tiny_model(num_layers=1)
    assert model.mean_activations is not None
    activations = np.random.default_rng(0).normal(size=(3, 3))
    activations[1] = model.mean_activations.mean[1]
    parts = label_parts(model, activations, "mean")
    np.testing.assert_array_equal(parts.contributions[1], 0)
    assert (np.abs(parts.contributions[[0, 2]]) > 1e-3).all()
    assert (np.abs(label_parts(model, activations, "zero").contributions[1]) > 1e-3).any()


def test_what_changes_no_probability_changes_no_contribution() -> None:
    model = tiny_model(num_layers=1)
    rng, predictor = np.random.default_rng(1), model.heads["predictor"]
    shifted = {
        "kernel": np.asarray(predictor["kernel"]) + rng.normal(size=(3, 3, 1)),
        "bias": np.asarray(predictor["bias"]) + 2.0,
    }
    moved = dataclasses.replace(model, heads={**model.heads, "predictor": shifted})
    activations = rng.normal(size=(3, 3))
    for one, other in zip(*(label_parts(each, activations, "mean") for each in (model, moved)), strict=True):
        np.testing.assert_allclose(one, other, atol=CLOSE)
    np.testing.assert_allclose(set_contributions(model, "mean"), set_contributions(moved, "mean"), atol=CLOSE)


def test_the_papers_form_counts_from_zero() -> None:
    model = tiny_model(num_layers=1)
    (pathway,) = explain(model, TEXTS[:1], reference="zero")
    kernel, bias = (np.asarray(model.heads["predictor"][name], float) for name in ("kernel", "bias"))
    for k, lane in enumerate(pathway.concepts):
        a = np.array(list(lane.activations.values()))
        np.testing.assert_allclose(list(lane.contributions.values()), a @ kernel[k], atol=CLOSE)
    np.testing.assert_allclose(list(pathway.base.values()), bias)
    set_to = predictor_weights(model, "zero")["service"]["Positive"]
    np.testing.assert_allclose(list(set_to.values()), model.class_activations[2, 1] @ kernel[2])


def test_old_models_count_from_zero() -> None:
    model = with_metadata(tiny_model(num_layers=1), {})
    assert reference_of(model) == explain(model, TEXTS[:1])[0].reference == "zero"
    np.testing.assert_array_equal(model.class_activations, [np.eye(3)] * 3)
    with pytest.raises(ValueError, match="does not know its mean activations; expected the reference 'zero'"):
        explain(model, TEXTS[:1], reference="mean")
    with pytest.raises(ValueError, match="reference is 'median'; expected 'mean' or 'zero'"):
        explain(model, TEXTS[:1], reference="median")  # type: ignore[arg-type]  # wrong on purpose


def test_a_label_is_compared_with_another() -> None:
    model = tiny_model(num_layers=1)
    (pathway,) = explain(model, TEXTS[:1])
    ranked = sorted(pathway.label_probabilities, key=lambda label: -pathway.label_probabilities[label])
    assert [pathway.explained_label, pathway.foil] == ranked[:2]
    last = ranked[-1]
    (pathway,) = explain(model, TEXTS[:1], foil=last)
    assert pathway.foil == last
    for lane in pathway.concepts:
        assert lane.contrast == pytest.approx(lane.contributions[ranked[0]] - lane.contributions[last])
    with pytest.raises(ValueError, match="there is no label 'goood'"):
        explain(model, TEXTS[:1], foil="goood")
    with pytest.raises(ValueError, match="the foil 'bad' is the label that is explained"):
        explain(model, TEXTS[:1], "bad", foil="bad")


def test_effects_on_an_ordered_label() -> None:
    assert label_values(["1", "2.5", "10"]) is not None
    assert all(label_values(labels) is None for labels in (["bad", "good"], ["2", "1"], ["1", "nan"]))
    values = np.array([1.0, 2.0, 3.0])
    assert expected_label(np.log([0.2, 0.3, 0.5]), values) == pytest.approx(2.3)
    parts = LabelParts(np.zeros(3), np.log([[0.2, 0.3, 0.5], [1.0, 1.0, 1.0]]))
    np.testing.assert_allclose(label_effects(parts, values), [0.3, 0.0], atol=1e-9)
    schema = dataclasses.replace(tiny_model(num_layers=1).schema, labels=("1", "2"))
    labelled = dataclasses.replace(tiny_model(num_layers=1), schema=schema)
    (pathway,) = explain(labelled, TEXTS[:1])
    assert pathway.expected_label == pytest.approx(1 + pathway.label_probabilities["2"])
    assert all(lane.effect is not None for lane in pathway.concepts)
    (pathway,) = explain(tiny_model(num_layers=1), TEXTS[:1])
    assert pathway.expected_label is None and pathway.concepts[0].effect is None


def test_means_are_of_the_texts_that_are_read_so() -> None:
    rng = np.random.default_rng(0)
    activations, classes = rng.normal(size=(40, 2, 3)), rng.integers(0, 2, (40, 2))
    found = mean_activations(activations, classes)
    np.testing.assert_allclose(found.mean, activations.mean(0))
    np.testing.assert_allclose(found.by_class[1, 0], activations[classes[:, 1] == 0, 1].mean(0))
    # No text is read as class 2: it trades places with the highest.
    assert found.by_class[0, 2].argmax() == 2
    assert sorted(found.by_class[0, 2]) == sorted(found.mean[0])
    assert MeanActivations(*found).to_metadata().keys() == {"mean_activations", "class_activations"}


@pytest.mark.parametrize("broken", [None, [[0.0, 1.0, 2.0]], [[0.0, 1.0, float("nan")]] * 3, "many"])
def test_means_of_another_shape_are_refused(broken: Any) -> None:
    model = tiny_model(num_layers=1)
    with pytest.raises(ValueError, match=r"metadata.mean_activations is not 3 x 3 finite numbers"):
        _ = with_metadata(model, {**model.metadata, "mean_activations": broken}).mean_activations
