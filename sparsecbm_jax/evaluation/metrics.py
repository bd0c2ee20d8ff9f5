"""Metrics as sums that add up over batches and hosts, and the numbers made from those sums.

Every metric has two parts. The *sums* (`confusion`, `calibration_sums`, `log_loss_sums`) are pure functions that run
under `jit` and can be added: the sums of two batches are the sums of their concatenation. The *finalisers*
(`accuracy`, `macro_f1`, `paper_macro_f1`, `majority_accuracy`, `expected_calibration_error`, `log_loss`) turn added
sums into numbers, in float64 on the host. A finaliser of sums without any counted cell is NaN.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

NUM_BINS = 15


def _counted(target: Int[Array, "*n"], weight: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.where(target >= 0, weight, 0.0).astype(jnp.float32)


def confusion(
    predicted: Int[Array, "*n"], target: Int[Array, "*n"], weight: Float[Array, "*n"], num_classes: int
) -> Float[Array, "C C"]:
    """Computes the weighted confusion matrix; rows are the target class, columns the predicted class.

    Args:
        predicted: Predicted class of each cell, in [0, num_classes).
        target: True class of each cell; a negative one means no label and contributes nothing.
        weight: Weight of each cell; 0 for padding.
        num_classes: Number of classes C.

    Returns:
        Sums, float32; exact for unit weights up to 2**24 cells in one call.

    >>> confusion(jnp.array([0, 1, 1]), jnp.array([0, 0, -1]), jnp.ones(3), 2).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    # A product of one-hots, not a scatter, can be partitioned over a sharded batch without a gather.
    rows = jax.nn.one_hot(target.reshape(-1), num_classes, dtype=jnp.float32)
    columns = jax.nn.one_hot(predicted.reshape(-1), num_classes, dtype=jnp.float32)
    weights = _counted(target, weight).reshape(-1)
    return jnp.einsum("nc,nd->cd", rows * weights[:, None], columns, precision=jax.lax.Precision.HIGHEST)


def calibration_sums(
    probabilities: Float[Array, "*n C"], target: Int[Array, "*n"], weight: Float[Array, "*n"], num_bins: int = NUM_BINS
) -> Float[Array, "3 num_bins"]:
    """Computes, for each bin of confidence, total weight, summed confidence and summed correctness.

    The confidence of a cell is the probability of its most probable class. Bin i holds confidences in (i/n, (i+1)/n].

    Args:
        probabilities: Class probabilities of each cell.
        target: True class of each cell; a negative one contributes nothing.
        weight: Weight of each cell; 0 for padding.
        num_bins: Number of bins of equal width over [0, 1].

    Returns:
        Sums to be added and given to `expected_calibration_error`.

    >>> calibration_sums(jnp.array([[0.9, 0.1]]), jnp.array([0]), jnp.ones(1), 2)[0].tolist()
    [0.0, 1.0]
    """
    confidence = jnp.max(probabilities, axis=-1).reshape(-1).astype(jnp.float32)
    correct = (jnp.argmax(probabilities, axis=-1) == target).reshape(-1)
    weights = _counted(target, weight).reshape(-1)
    bins = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
    values = jnp.stack([jnp.ones_like(confidence), confidence, correct.astype(jnp.float32)])
    # where, not multiply: a NaN in a padding row must not reach the sums.
    values = jnp.where(weights[None, :] != 0, values * weights[None, :], 0.0)
    return jnp.einsum("vn,nb->vb", values, jax.nn.one_hot(bins, num_bins), precision=jax.lax.Precision.HIGHEST)


def log_loss_sums(
    logits: Float[Array, "*n C"], target: Int[Array, "*n"], weight: Float[Array, "*n"]
) -> Float[Array, " 2"]:
    """Computes the summed negative log likelihood of the target class, and the weight that it was summed over.

    Args:
        logits: Unnormalised log probabilities of each cell.
        target: True class of each cell; a negative one contributes nothing.
        weight: Weight of each cell; 0 for padding.

    Returns:
        Sums to be added and given to `log_loss`.

    >>> log_loss(log_loss_sums(jnp.zeros((1, 2)), jnp.array([1]), jnp.ones(1))) - math.log(2) < 1e-6
    True
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probabilities, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
    weights = _counted(target, weight)
    return jnp.stack([jnp.sum(jnp.where(weights != 0, -picked * weights, 0.0)), jnp.sum(weights)])


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> float:
    denominator = float(np.asarray(denominator, np.float64))
    return float(np.asarray(numerator, np.float64)) / denominator if denominator else math.nan


def accuracy(confusion_sums: ArrayLike) -> float:
    """Computes the share of the counted weight that was predicted correctly, in [0, 1].

    >>> accuracy([[3, 1], [0, 4]])
    0.875
    """
    sums = np.asarray(confusion_sums, np.float64)
    return _ratio(np.trace(sums), sums.sum())


def majority_accuracy(confusion_sums: ArrayLike) -> float:
    """Computes the accuracy of always predicting the most frequent target class among the counted cells, in [0, 1].

    >>> majority_accuracy([[3, 1], [0, 6]])
    0.6
    """
    sums = np.asarray(confusion_sums, np.float64)
    return _ratio(sums.sum(axis=1).max(), sums.sum())


def _f1(true_positive: np.ndarray, false_positive: np.ndarray, false_negative: np.ndarray) -> np.ndarray:
    twice = 2.0 * true_positive
    denominator = twice + false_positive + false_negative
    return np.divide(twice, denominator, out=np.zeros_like(twice), where=denominator > 0)


def _one_against_rest(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    true_positive = np.diagonal(sums)
    false_positive = sums.sum(axis=0) - true_positive
    false_negative = sums.sum(axis=1) - true_positive
    true_negative = sums.sum() - true_positive - false_positive - false_negative
    return true_positive, false_positive, false_negative, true_negative


def macro_f1(confusion_sums: ArrayLike) -> float:
    """Computes the mean over classes of the class's F1, in [0, 1].

    F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c), and 0 where that is 0 / 0. A class that is neither among the targets nor
    among the predictions therefore counts as 0 in the mean, as in `sklearn.metrics.f1_score(..., labels=range(C),
    average="macro", zero_division=0)`.

    >>> macro_f1([[1, 1], [0, 2]])
    0.7333333333333334
    """
    sums = np.asarray(confusion_sums, np.float64)
    if not sums.sum():
        return math.nan
    true_positive, false_positive, false_negative, _ = _one_against_rest(sums)
    return float(_f1(true_positive, false_positive, false_negative).mean())


def paper_macro_f1(confusion_sums: ArrayLike) -> float:
    """Computes the mean over classes of the *binary macro* F1 of class against rest, in [0, 1].

    For each class, F1 of 'is the class' and F1 of 'is not the class' are averaged; then the classes are averaged. True
    negatives count, so it is well above `macro_f1`. With two classes the two are the same. 0 / 0 counts as 0, as in
    `macro_f1`.

    Reference: the macro F1 of Table 2 of the paper.

    >>> paper_macro_f1([[2, 0, 0], [0, 0, 2], [0, 2, 0]]) > macro_f1([[2, 0, 0], [0, 0, 2], [0, 2, 0]])
    True
    """
    sums = np.asarray(confusion_sums, np.float64)
    if not sums.sum():
        return math.nan
    true_positive, false_positive, false_negative, true_negative = _one_against_rest(sums)
    of_class = _f1(true_positive, false_positive, false_negative)
    of_rest = _f1(true_negative, false_negative, false_positive)
    return float((0.5 * (of_class + of_rest)).mean())


def expected_calibration_error(sums: ArrayLike) -> float:
    """Computes the expected calibration error, Σ_b (n_b / n) |accuracy_b − confidence_b|, in [0, 1].

    Args:
        sums: Added outputs of `calibration_sums`.

    >>> expected_calibration_error([[0, 2], [0, 1.5], [0, 1]])
    0.25

    Reference: Guo et al. 2017, On calibration of modern neural networks, Eq. 3.
    """
    weights, confidence, correct = np.asarray(sums, np.float64)
    return _ratio(np.abs(correct - confidence).sum(), weights.sum())


def log_loss(sums: ArrayLike) -> float:
    """Computes the mean negative log likelihood in nats, from added outputs of `log_loss_sums`.

    >>> log_loss([3.0, 2.0])
    1.5
    """
    total, weight = np.asarray(sums, np.float64)
    return _ratio(total, weight)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def summarise(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Computes mean and sample standard deviation of every number in reports of the same shape, one report a seed.

    Args:
        reports: Dicts, nested alike. Numbers are summarised (`None` and NaN mean 'no value' and are left out); any
            other value is copied where all reports agree on it and left out where they do not.

    Returns:
        The same nesting with `{"mean", "sd", "num"}` in place of each number. `sd` divides by num − 1 and is None for
        fewer than two values; `mean` is None for none.

    Raises:
        ValueError: There are no reports, or not all of them have a key; the key and the report's position are named.

    >>> summarise([{"a": 1.0}, {"a": 3.0}])
    {'a': {'mean': 2.0, 'sd': 1.4142135623730951, 'num': 2}}
    """
    if not reports:
        raise ValueError("summarise: expected at least one report, got none")
    return _summarise(reports, "")


def _summarise(reports: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
    keys = list(reports[0])
    for position, report in enumerate(reports):
        if odd := sorted(set(keys) ^ set(report)):
            names = ", ".join(repr(f"{path}{key}") for key in odd)
            raise ValueError(
                f"summarise: report {position} and report 0 do not both have {names}; expected the same keys in all"
            )
    summary: dict[str, Any] = {}
    for key in keys:
        values = [report[key] for report in reports]
        if all(isinstance(value, Mapping) for value in values):
            summary[key] = _summarise(values, f"{path}{key}/")
        elif all(value is None or _is_number(value) for value in values):
            summary[key] = _mean_and_sd(values)
        elif all(value == values[0] for value in values):
            summary[key] = values[0]
    return summary


def _mean_and_sd(values: Sequence[float | None]) -> dict[str, float | int | None]:
    numbers = np.array([value for value in values if value is not None and not math.isnan(value)], np.float64)
    return {
        "mean": float(numbers.mean()) if numbers.size else None,
        "sd": float(numbers.std(ddof=1)) if numbers.size > 1 else None,
        "num": int(numbers.size),
    }
