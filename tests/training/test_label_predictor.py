"""φ is fitted to the optimum, groups apart; temperatures leave predictions as they are, as sure as they are right."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.heads import activate, predict_label, project
from sparsecbm_jax.training.calibration import calibrated, log_loss, temperature
from sparsecbm_jax.training.label_predictor import (
    PENALTIES,
    Outputs,
    _fitted_on,
    _folds,
    _of_gold_classes,
    _optimum,
    _reading_as_before,
    fit_predictor,
)

K, C, Y, N = 2, 3, 3, 240
# Of L-BFGS in float64.
STATIONARY = 1e-4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def problem(rng: np.random.Generator, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Activations, and labels that follow from them but for some."""
    concepts = rng.integers(0, C, (N, K))
    labels = np.where(concepts[:, 0] == 1, concepts[:, 1], 0)
    labels = np.where(rng.random(N) < noise, rng.integers(0, Y, N), labels)
    return np.eye(C)[concepts], labels


def test_the_fit_is_the_optimum(rng: np.random.Generator) -> None:
    activations, labels = problem(rng, noise=0.3)
    inputs, penalty = activations.reshape(N, -1), 1e-3
    kernel, bias = _optimum(inputs, labels, penalty, Y)

    def loss(kernel: jax.Array, bias: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(inputs @ kernel + bias)
        return -jnp.mean(log_p[jnp.arange(N), labels]) + 0.5 * penalty * jnp.sum(kernel**2)

    for slope in jax.grad(loss, argnums=(0, 1))(jnp.asarray(kernel), jnp.asarray(bias)):
        assert float(jnp.abs(slope).max()) < STATIONARY


def test_rows_that_were_left_out_judge_the_penalty(rng: np.random.Generator) -> None:
    activations, labels = problem(rng)
    labels[:20] = -1
    fit = fit_predictor(activations, labels, np.arange(N), num_labels=Y)
    heads = {"predictor": {"kernel": jnp.asarray(fit.kernel), "bias": jnp.asarray(fit.bias)}}
    predicted = np.argmax(predict_label(heads, jnp.asarray(activations)), axis=-1)
    assert (predicted == labels)[20:].all() and fit.penalty == min(PENALTIES)
    # Labels that follow from nothing want the heaviest penalty, and cross-validation is not fooled.
    chance = fit_predictor(activations, rng.integers(0, Y, N), np.arange(N), num_labels=Y)
    assert chance.penalty > 1e-2
    with pytest.raises(AssertionError, match="activations"):
        fit_predictor(activations[:-1], labels, np.arange(N), num_labels=Y)
    with pytest.raises(ValueError, match="no row has a task label"):
        fit_predictor(activations, -np.ones(N, int), np.arange(N), num_labels=Y)


def test_a_group_is_in_one_fold(rng: np.random.Generator) -> None:
    groups = rng.permutation(N) % 40
    folds = _folds(groups)
    assert all(len(set(folds[groups == group])) == 1 for group in range(40)) and len(set(folds)) == 5
    # A label that is its group's alone, told by an activation of its own, cannot be predicted from other groups.
    activations, labels = np.eye(40)[groups][:, None], rng.integers(0, Y, 40)[groups]
    fit = fit_predictor(activations, labels, groups, num_labels=Y)
    assert (fit.logits.argmax(1) == labels).mean() < 0.7
    apart = fit_predictor(activations, labels, np.arange(N), num_labels=Y)
    assert (apart.logits.argmax(1) == labels).mean() > 0.95


@pytest.mark.parametrize("name", ["projector", "predictor"])
def test_a_temperature_divides_logits(name: str, rng: np.random.Generator) -> None:
    heads: dict[str, Any] = {
        "projector": {"kernel": rng.normal(size=(K, 4, C)), "bias": rng.normal(size=(K, C))},
        "predictor": {"kernel": rng.normal(size=(K, C, Y)), "bias": rng.normal(size=Y)},
    }
    heads = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), heads)
    temperatures = np.array([2.0, 0.5]) if name == "projector" else np.array(4.0)
    cooled = calibrated(heads, name, temperatures)
    z = jnp.asarray(rng.normal(size=(5, K, 4)), jnp.float32)
    u = project(heads, z)
    if name == "projector":
        np.testing.assert_allclose(project(cooled, z), u / temperatures[:, None], rtol=1e-5)
    else:
        np.testing.assert_allclose(predict_label(cooled, u), predict_label(heads, u) / 4, rtol=1e-5)


def test_a_temperature_makes_probabilities_right(rng: np.random.Generator) -> None:
    logits = 2 * rng.normal(size=(4000, C))
    labels = np.array([rng.choice(C, p=row) for row in np.exp(logits) / np.exp(logits).sum(1, keepdims=True)])
    found = temperature(3 * logits, labels)
    assert found == pytest.approx(3, rel=0.1)
    assert log_loss(3 * logits / found, labels) < log_loss(3 * logits, labels) - 0.05
    assert temperature(logits, np.full(4000, -1)) == 1


@pytest.mark.parametrize("is_trained_well", [False, True])
def test_the_better_predictor_is_kept(is_trained_well: bool, rng: np.random.Generator) -> None:
    activations, labels = problem(rng)
    u = 4 * activations
    # One that knows the labels, which no fit on activations with noise could match, and one that knows nothing.
    own = 9.0 * np.eye(Y)[labels] if is_trained_well else rng.normal(size=(N, Y))
    flipped = np.where(rng.random((N, 1, 1)) < 0.4, activations[::-1], activations)
    trained = {
        "projector": {"kernel": jnp.ones((K, 4, C)), "bias": jnp.zeros((K, C))},
        "predictor": {"kernel": jnp.ones((K, C, Y)), "bias": jnp.zeros(Y)},
    }
    outputs = Outputs(u, own, u.argmax(-1), labels, np.arange(N))
    heads, report = _fitted_on(outputs, flipped, trained, {**trained, "projector": {"marked": jnp.zeros(1)}})
    assert report["fitted_on"] == ("nothing" if is_trained_well else "validation")
    assert ("marked" in heads["projector"]) != is_trained_well
    assert (report["cross_validated"]["log_loss"] < report["as_trained"]["log_loss"]) != is_trained_well
    few = outputs._replace(labels=np.where(np.arange(N) < 19, labels, -1))
    assert _fitted_on(few, flipped, trained, trained) == (trained, {"fitted_on": "nothing"})


def test_a_predictor_that_is_kept_reads_as_before(rng: np.random.Generator) -> None:
    config: Any = type("Config", (), {"activation": CBMConfig.activation})
    temperatures = np.array([2.0, 0.5])
    trained: dict[str, Any] = {
        "projector": {"kernel": rng.normal(size=(K, 4, C)), "bias": rng.normal(size=(K, C))},
        "predictor": {"kernel": rng.normal(size=(K, C, Y)), "bias": rng.normal(size=Y)},
    }
    trained = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), trained)
    heads = _reading_as_before(trained, calibrated(trained, "projector", temperatures), temperatures)
    z = jnp.asarray(rng.normal(size=(5, K, 4)), jnp.float32)
    before, after = (project(one, z) for one in (trained, heads))
    np.testing.assert_allclose(after, before / temperatures[:, None], rtol=1e-5)
    label = [predict_label(one, activate(config, u)) for one, u in ((trained, before), (heads, after))]
    np.testing.assert_allclose(*label, atol=1e-5)


def test_a_gold_class_is_read_as_its_texts_are(rng: np.random.Generator) -> None:
    activations, concepts = rng.normal(size=(6, 1, C)), np.array([[0], [0], [2], [2], [2], [-1]])
    gold = _of_gold_classes(activations, concepts)
    np.testing.assert_allclose(gold[0], activations[:2].mean(0))
    np.testing.assert_allclose(gold[4], activations[2:5].mean(0))
    np.testing.assert_allclose(gold[5], activations.mean(0))


def test_the_unit_of_activations_changes_nothing(rng: np.random.Generator) -> None:
    activations, labels = problem(rng, noise=0.3)
    fit, small = (fit_predictor(unit * activations, labels, np.arange(N), num_labels=Y) for unit in (1.0, 0.01))
    assert fit.penalty == small.penalty
    np.testing.assert_allclose(0.01 * small.kernel, fit.kernel, atol=1e-3)


def test_activations_of_all_forms() -> None:
    u = jnp.array([[1.0, 2.0, 6.0]])
    config: Any = type("Config", (), {"activation": "log_odds"})
    assert isinstance(config.activation, str) and CBMConfig.activation == "log_odds"
    np.testing.assert_allclose(activate(config, u), [[-0.2, -0.1, 0.3]], rtol=1e-6)
    config.activation = "centred"
    np.testing.assert_allclose(activate(config, u), jax.nn.sigmoid(jnp.array([[-2.0, -1.0, 3.0]])))
    config.activation = "sigmoid"
    np.testing.assert_allclose(activate(config, u), jax.nn.sigmoid(u))
