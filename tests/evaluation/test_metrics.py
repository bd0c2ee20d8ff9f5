"""Metrics against formulae written out by hand, and their sums over batches."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.evaluation import metrics

pytestmark = pytest.mark.strict_rank

# float32 sums of float32 probabilities against float64 formulae.
FLOAT32_TOLERANCE = 1e-6


def make_cells(seed, num=200, num_classes=3):
    """Probabilities, targets (some missing) and weights (some padding)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num, num_classes)).astype(np.float32) * 2
    target = rng.integers(-1, num_classes, size=num).astype(np.int32)
    weight = (rng.random(num) > 0.1).astype(np.float32)
    return logits, target, weight


def counted(logits, target, weight):
    keep = (target >= 0) & (weight > 0)
    return logits[keep].argmax(-1), target[keep]


def binary_f1(truth, guess):
    """F1 of one class by its definition through precision and recall, 0 / 0 = 0."""
    hits = np.sum(truth & guess)
    precision = hits / guess.sum() if guess.sum() else 0.0
    recall = hits / truth.sum() if truth.sum() else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def confusion_of(logits, target, weight, num_classes=3):
    return np.asarray(metrics.confusion(jnp.argmax(logits, -1), jnp.asarray(target), jnp.asarray(weight), num_classes))


@pytest.mark.parametrize("seed", range(3))
def test_scores_match_their_definitions(seed):
    cells = make_cells(seed)
    guess, truth = counted(*cells)
    sums = confusion_of(*cells)
    expected = np.zeros((3, 3))
    np.add.at(expected, (truth, guess), 1)
    chex.assert_trees_all_equal(sums, expected.astype(np.float32))
    assert metrics.accuracy(sums) == np.mean(guess == truth)
    assert metrics.majority_accuracy(sums) == max(np.mean(truth == c) for c in range(3))
    by_class = [binary_f1(truth == c, guess == c) for c in range(3)]
    by_rest = [binary_f1(truth != c, guess != c) for c in range(3)]
    assert metrics.macro_f1(sums) == pytest.approx(np.mean(by_class), rel=1e-12)
    assert metrics.paper_macro_f1(sums) == pytest.approx(np.mean([by_class, by_rest]), rel=1e-12)


def test_calibration_and_log_loss_match_their_definitions():
    logits, target, weight = make_cells(7)
    probabilities = np.asarray(jax.nn.softmax(logits, -1))
    guess, truth = counted(logits, target, weight)
    keep = (target >= 0) & (weight > 0)
    confidence = probabilities.max(-1)[keep].astype(np.float64)
    error = 0.0
    for low in range(15):
        here = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if here.any():
            error += here.mean() * abs((guess == truth)[here].mean() - confidence[here].mean())
    sums = metrics.calibration_sums(jnp.asarray(probabilities), jnp.asarray(target), jnp.asarray(weight))
    assert metrics.expected_calibration_error(sums) == pytest.approx(error, abs=FLOAT32_TOLERANCE)
    loss = -np.log(probabilities[keep].astype(np.float64)[np.arange(keep.sum()), truth]).mean()
    loss_sums = metrics.log_loss_sums(jnp.asarray(logits), jnp.asarray(target), jnp.asarray(weight))
    assert metrics.log_loss(loss_sums) == pytest.approx(loss, rel=FLOAT32_TOLERANCE)


def test_sums_of_batches_are_the_sums_of_the_whole():
    logits, target, weight = make_cells(3, num=64)
    probabilities = jax.nn.softmax(jnp.asarray(logits), -1)

    @jax.jit
    def all_sums(logits, probabilities, target, weight):
        return (
            metrics.confusion(jnp.argmax(logits, -1), target, weight, 3),
            metrics.calibration_sums(probabilities, target, weight),
            metrics.log_loss_sums(logits, target, weight),
        )

    whole = all_sums(logits, probabilities, target, weight)
    parts = [all_sums(*(x[i : i + 16] for x in (logits, probabilities, target, weight))) for i in range(0, 64, 16)]
    chex.assert_trees_all_equal(sum(part[0] for part in parts), whole[0])
    added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    chex.assert_trees_all_close(added, whole, rtol=FLOAT32_TOLERANCE)
    chex.assert_trees_all_equal(added[1][0], whole[1][0])


def test_cells_of_any_shape_and_fractional_weights():
    predicted = jnp.array([[0, 1], [1, 1]])
    target = jnp.array([[0, 0], [1, -1]])
    weight = jnp.array([[0.5, 2.0], [1.0, 1.0]])
    assert metrics.confusion(predicted, target, weight, 2).tolist() == [[0.5, 2.0], [0.0, 1.0]]


def test_nan_in_padding_or_unlabelled_rows_does_not_spread():
    logits = jnp.array([[2.0, 0.0], [jnp.nan, jnp.nan], [jnp.nan, 0.0]])
    target, weight = jnp.array([0, 1, -1]), jnp.array([1.0, 0.0, 1.0])
    loss = metrics.log_loss(metrics.log_loss_sums(logits, target, weight))
    assert loss == pytest.approx(math.log1p(math.exp(-2)), rel=FLOAT32_TOLERANCE)
    sums = metrics.calibration_sums(jax.nn.softmax(logits, -1), target, weight)
    assert np.isfinite(np.asarray(sums)).all() and sums[0].sum() == 1


@pytest.mark.parametrize(("confidence", "where"), [(0.0, 0), (1 / 15, 0), (0.07, 1), (1.0, 14)])
def test_bins_are_closed_on_the_right_and_hold_the_ends(confidence, where):
    sums = metrics.calibration_sums(jnp.array([[confidence, 0.0]]), jnp.array([0]), jnp.ones(1))
    assert sums[0].argmax() == where


def test_two_classes_make_both_macro_f1_equal():
    sums = [[30, 7], [11, 52]]
    assert metrics.macro_f1(sums) == pytest.approx(metrics.paper_macro_f1(sums), rel=1e-12)


def test_a_class_nobody_names_counts_as_zero():
    # As sklearn's f1_score(labels=[0, 1, 2], average="macro", zero_division=0).
    sums = [[4, 0, 0], [0, 6, 0], [0, 0, 0]]
    assert metrics.macro_f1(sums) == pytest.approx(2 / 3)
    assert metrics.paper_macro_f1(sums) == pytest.approx((1 + 1 + 0.5) / 3)


def test_paper_macro_f1_runs_above_macro_f1_as_the_paper_prints():
    # Five balanced labels, two thirds right, the rest spread evenly: about the paper's 65.9 against 78.6.
    sums = np.full((5, 5), (1 - 0.66) / 4) + np.eye(5) * (0.66 - (1 - 0.66) / 4)
    assert metrics.macro_f1(sums) == pytest.approx(0.66)
    assert metrics.paper_macro_f1(sums) == pytest.approx((0.66 + 0.915) / 2)


@pytest.mark.parametrize(
    "finaliser", [metrics.accuracy, metrics.macro_f1, metrics.paper_macro_f1, metrics.majority_accuracy]
)
def test_nothing_counted_is_nan(finaliser):
    assert math.isnan(finaliser(np.zeros((3, 3))))
    assert math.isnan(metrics.expected_calibration_error(np.zeros((3, 15))))
    assert math.isnan(metrics.log_loss(np.zeros(2)))


def test_counts_stay_exact_beyond_float32_when_added_on_the_host():
    batch = np.float64(2.0**24) * np.eye(2) + np.array([[0, 1], [0, 0]])
    assert metrics.accuracy(batch) == 2.0**25 / (2.0**25 + 1)


def test_summarise_is_the_sample_standard_deviation_over_nested_reports():
    runs = [
        {"task": {"accuracy": a, "ece": e}, "num": 5, "name": "x", "path": p, "best": None}
        for a, e, p in ((0.6, None, "a"), (0.7, 0.1, "b"), (0.65, 0.3, "c"))
    ]
    summary = metrics.summarise(runs)
    assert summary["task"]["accuracy"]["mean"] == pytest.approx(0.65)
    assert summary["task"]["accuracy"]["sd"] == pytest.approx(0.05)
    assert summary["task"]["ece"] == {"mean": pytest.approx(0.2), "sd": pytest.approx(math.sqrt(0.02)), "num": 2}
    assert summary["num"] == {"mean": 5.0, "sd": 0.0, "num": 3}
    assert summary["best"] == {"mean": None, "sd": None, "num": 0}
    assert summary["name"] == "x" and "path" not in summary


def test_summarise_of_one_seed_has_no_deviation_and_misfits_are_named():
    assert metrics.summarise([{"a": 2}]) == {"a": {"mean": 2.0, "sd": None, "num": 1}}
    with pytest.raises(ValueError, match="at least one report"):
        metrics.summarise([])
    with pytest.raises(ValueError, match=r"report 1 and report 0 do not both have 'a/b'"):
        metrics.summarise([{"a": {"b": 1, "c": 1}}, {"a": {"c": 1}}])
