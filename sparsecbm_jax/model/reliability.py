"""How far predictions can be relied on, measured on validation texts: where they are unsure, and where a guess does.

A prediction is unsure where its probability is below a threshold. The threshold is the least one above which at most an
accepted share of the validation texts is predicted incorrectly (selective prediction).

Reference: Geifman and El-Yaniv 2017, 'Selective Classification for Deep Neural Networks'; here without their bound.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

_KEY = "reliability"
# Of fewer labels a share says too little.
_MIN_LABELS = 20
# A guess does as well where the accuracy is above the majority's by less than so many standard errors.
_STANDARD_ERRORS = 2.0


class Reliability(NamedTuple):
    """What validation texts say of the predictions of one model.

    Attributes:
        concept_thresholds: probability below which a concept's class is unsure; above 1 where all are.
        is_guess: True for concepts that are read no better than by always naming the most frequent class.
        label_threshold: probability below which the label is unsure.
    """

    concept_thresholds: Float[np.ndarray, " K"]
    is_guess: Bool[np.ndarray, " K"]
    label_threshold: float

    def to_metadata(self) -> dict[str, Any]:
        """Returns what a model's metadata keep, as JSON values."""
        return {
            _KEY: {name: leaf if isinstance(leaf, float) else leaf.tolist() for name, leaf in self._asdict().items()}
        }

    @classmethod
    def whole(cls, num_concepts: int) -> "Reliability":
        """Returns that of a model of which nothing is known: nothing is unsure."""
        return cls(np.zeros(num_concepts), np.zeros(num_concepts, bool), 0.0)


def measure_reliability(
    concept_probabilities: Float[np.ndarray, "N K C"],
    concepts: Int[np.ndarray, "N K"],
    label_probabilities: Float[np.ndarray, "N Y"],
    labels: Int[np.ndarray, " N"],
    accepted_risk: float,
) -> Reliability:
    """Measures the reliability of predictions for texts that they were not fitted to.

    Args:
        concept_probabilities: predicted.
        concepts: gold classes; negative where there is none.
        label_probabilities: predicted.
        labels: gold labels; negative where there is none.
        accepted_risk: share of incorrect predictions among those that are not unsure, in [0, 1].
    """
    columns = range(concepts.shape[1])
    return Reliability(
        np.array([threshold(concept_probabilities[:, k], concepts[:, k], accepted_risk) for k in columns]),
        np.array([is_guess(concept_probabilities[:, k], concepts[:, k]) for k in columns], bool),
        threshold(label_probabilities, labels, accepted_risk),
    )


def threshold(probabilities: Float[np.ndarray, "N C"], gold: Int[np.ndarray, " N"], accepted_risk: float) -> float:
    """Finds the least probability above which at most a share of the predictions is incorrect; 2 where there is none.

    With fewer than 20 labels nothing is known, and it is 0.

    >>> import numpy as np
    >>> p = np.linspace(0.5, 0.99, 50)
    >>> wrong_below_07 = np.where(p < 0.7, 1, 0)
    >>> float(threshold(np.stack([p, 1 - p], 1), wrong_below_07, 0.0))
    0.7
    """
    known = gold >= 0
    if known.sum() < _MIN_LABELS:
        return 0.0
    surest, is_wrong = probabilities[known].max(axis=1), probabilities[known].argmax(axis=1) != gold[known]
    order = np.argsort(-surest, kind="stable")
    risks = np.cumsum(is_wrong[order]) / np.arange(1, len(order) + 1)
    # Predictions of one probability are taken together.
    is_last = np.append(np.diff(surest[order]) != 0, True)
    fitting = np.flatnonzero(is_last & (risks <= accepted_risk))
    if not len(fitting):
        return 2.0
    return 0.0 if fitting[-1] == len(order) - 1 else float(surest[order[fitting[-1]]])


def is_guess(probabilities: Float[np.ndarray, "N C"], gold: Int[np.ndarray, " N"]) -> bool:
    """Says whether always naming the most frequent class is right as often, but for two standard errors."""
    known = gold >= 0
    if known.sum() < _MIN_LABELS:
        return False
    accuracy = np.mean(probabilities[known].argmax(axis=1) == gold[known])
    majority = np.bincount(gold[known]).max() / known.sum()
    return bool(accuracy - majority < _STANDARD_ERRORS * np.sqrt(accuracy * (1 - accuracy) / known.sum()))


def read_reliability(metadata: Mapping[str, Any], num_concepts: int) -> Reliability:
    """Reads what `to_metadata` gave; of models that have none, as those of version 0.1.0, nothing is unsure.

    Raises:
        ValueError: if it is not of the model's shape.
    """
    if _KEY not in metadata:
        return Reliability.whole(num_concepts)
    try:
        found = metadata[_KEY]
        thresholds = np.asarray(found["concept_thresholds"], float)
        guesses = np.asarray(found["is_guess"], bool)
        of_label = float(found["label_threshold"])
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"metadata.{_KEY} is not what a model keeps: {error}") from error
    if thresholds.shape != (num_concepts,) or guesses.shape != (num_concepts,):
        raise ValueError(f"metadata.{_KEY} is not of {num_concepts} concepts")
    return Reliability(thresholds, guesses, of_label)
