"""Activations that occur: of each concept on average, and on average where it is read as one of its classes.

A contribution is counted from the first; a concept that a person sets to a class is given the second.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

_KEYS = ("mean_activations", "class_activations")


class MeanActivations(NamedTuple):
    """Means over the texts of training.

    Attributes:
        mean: of all texts.
        by_class: of the texts that the model reads as class c of concept k, at [k, c].
    """

    mean: Float[np.ndarray, "K C"]
    by_class: Float[np.ndarray, "K C C"]

    def to_metadata(self) -> dict[str, Any]:
        """Returns what a model's metadata keep, as JSON values."""
        return dict(zip(_KEYS, (leaf.tolist() for leaf in self), strict=True))


def mean_activations(activations: Float[np.ndarray, "N K C"], classes: Int[np.ndarray, "N K"]) -> MeanActivations:
    """Averages activations.

    Where no text is read as a class, the class takes the place of the one that is highest on average.

    Args:
        activations: a of every text.
        classes: that every text is read as.

    >>> import numpy as np
    >>> a = np.array([[[3.0, -3.0]], [[1.0, -1.0]]])
    >>> found = mean_activations(a, np.array([[0], [0]]))
    >>> found.mean.tolist(), found.by_class.tolist()
    ([[2.0, -2.0]], [[[2.0, -2.0], [-2.0, 2.0]]])
    """
    mean = np.asarray(activations, float).mean(axis=0)
    num_concepts, num_classes = mean.shape
    by_class = np.zeros((num_concepts, num_classes, num_classes))
    for concept in range(num_concepts):
        for value in range(num_classes):
            rows = classes[:, concept] == value
            if rows.any():
                by_class[concept, value] = activations[rows, concept].mean(axis=0)
            else:
                highest = int(mean[concept].argmax())
                by_class[concept, value] = mean[concept]
                by_class[concept, value, [value, highest]] = mean[concept, [highest, value]]
    return MeanActivations(mean, by_class)


def read_mean_activations(metadata: Mapping[str, Any], num_concepts: int, num_classes: int) -> MeanActivations | None:
    """Reads what `to_metadata` gave; None where a model has none, as those of version 0.1.0.

    Raises:
        ValueError: if they are not finite numbers of the model's shape.
    """
    if not any(key in metadata for key in _KEYS):
        return None
    leaves = []
    for key, shape in zip(_KEYS, ((num_concepts, num_classes), (num_concepts, num_classes, num_classes)), strict=True):
        try:
            leaf = np.asarray(metadata.get(key), float)
        except (TypeError, ValueError):
            leaf = np.zeros(0)
        if leaf.shape != shape or not np.isfinite(leaf).all():
            raise ValueError(f"metadata.{key} is not {' x '.join(map(str, shape))} finite numbers")
        leaves.append(leaf)
    return MeanActivations(*leaves)
