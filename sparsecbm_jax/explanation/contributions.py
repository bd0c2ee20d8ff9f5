"""What each concept adds to the label's logits, counted from the average text, and against the other labels.

Two constants of y = φ_0 + Σ_k a_k φ_k say nothing. Where a_k is counted from is a choice: from zero, a concept that no
text mentions contributes. And a number that is added to the logits of all labels changes no probability. So activations
are counted from their mean over the texts of training, ā_k, and logits from their mean over the labels:

    y_j − mean_j y = base_j + Σ_k contribution_kj,
    contribution_k = centred((a_k − ā_k) φ_k), base = centred(φ_0 + Σ_k ā_k φ_k).

The paper's form counts from zero: contribution_k = a_k φ_k, base = φ_0 (Eq. 3).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from sparsecbm_jax.model.sparse_cbm import SparseCBM

Reference = Literal["mean", "zero"]


class LabelParts(NamedTuple):
    """The parts of each label's logit: base + Σ_k contributions = logits."""

    base: Float[np.ndarray, " Y"]
    contributions: Float[np.ndarray, "K Y"]

    @property
    def logits(self) -> Float[np.ndarray, " Y"]:
        """The logits that the parts sum to; with the reference 'mean' those of the model less their mean."""
        return self.base + self.contributions.sum(axis=0)


def reference_of(model: SparseCBM, reference: Reference | None = None) -> Reference:
    """Returns where a model's contributions are counted from.

    Args:
        model: the model.
        reference: 'mean', 'zero', or None for 'mean' where the model has mean activations.

    Raises:
        ValueError: if there is no such reference, or the model, one of version 0.1.0, has no mean activations.
    """
    if reference not in (None, "mean", "zero"):
        raise ValueError(f"reference is {reference!r}; expected 'mean' or 'zero'")
    has_mean = model.mean_activations is not None
    if reference == "mean" and not has_mean:
        raise ValueError("the model does not know its mean activations; expected the reference 'zero'")
    return reference or ("mean" if has_mean else "zero")


def label_parts(model: SparseCBM, activations: Float[np.ndarray, "K C"], reference: Reference) -> LabelParts:
    """Takes the logits of a text's label apart.

    Args:
        model: a model with concepts.
        activations: a of the text.
        reference: where contributions are counted from; see `reference_of`.
    """
    kernel, bias = _predictor(model)
    if reference == "zero":
        return LabelParts(bias, np.einsum("kc,kcy->ky", activations, kernel))
    assert model.mean_activations is not None
    mean = model.mean_activations.mean
    base = bias + np.einsum("kc,kcy->y", mean, kernel)
    return LabelParts(_centred(base), _centred(np.einsum("kc,kcy->ky", np.asarray(activations, float) - mean, kernel)))


def set_contributions(model: SparseCBM, reference: Reference) -> Float[np.ndarray, "K C Y"]:
    """Computes what concept k contributes to each label where a person sets it to class c.

    Its activations are then the model's `class_activations`.
    """
    kernel, _ = _predictor(model)
    if reference == "zero":
        return np.einsum("kdc,kcy->kdy", model.class_activations, kernel)
    assert model.mean_activations is not None
    return _centred(np.einsum("kdc,kcy->kdy", model.class_activations - model.mean_activations.mean[:, None], kernel))


def label_values(labels: Sequence[str]) -> Float[np.ndarray, " Y"] | None:
    """Returns the numbers that ordered labels stand for, such as stars; None where they are no rising numbers.

    >>> label_values(["1", "2", "3"]).tolist(), label_values(["bad", "good"])
    ([1.0, 2.0, 3.0], None)
    """
    try:
        values = np.array([float(label) for label in labels])
    except ValueError:
        return None
    return values if np.isfinite(values).all() and (np.diff(values) > 0).all() else None


def expected_label(logits: Float[np.ndarray, "*B Y"], values: Float[np.ndarray, " Y"]) -> Float[np.ndarray, "*B"]:
    """Computes Σ_j p_j v_j, the mean of an ordered label."""
    return special.softmax(logits, axis=-1) @ values


def label_effects(parts: LabelParts, values: Float[np.ndarray, " Y"]) -> Float[np.ndarray, " K"]:
    """Computes by how much each concept moves the expected label from where it would be without its contribution."""
    without = parts.logits - parts.contributions
    return expected_label(parts.logits, values) - expected_label(without, values)


def _predictor(model: SparseCBM) -> tuple[Float[np.ndarray, "K C Y"], Float[np.ndarray, " Y"]]:
    kernel, bias = (np.asarray(model.heads["predictor"][name], float) for name in ("kernel", "bias"))
    return kernel, bias


def _centred(logits: Float[np.ndarray, "*B Y"]) -> Float[np.ndarray, "*B Y"]:
    return logits - logits.mean(axis=-1, keepdims=True)
