"""Scores of a model on batches.

A batch is scored by two jitted functions, the model's forward pass and the sums of `metrics`; the host only adds sums
and divides them at the end. Dropout is off.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.data.schema import Schema
from sparsecbm_jax.evaluation import metrics
from sparsecbm_jax.model.config import CBMConfig, CBMOutput
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays

ForwardFn = Callable[[ModelArrays, Batch], CBMOutput]


_pack = jax.jit(masks_lib.pack)


class EvaluationSums(NamedTuple):
    """The sums of one batch for the scores; fields of two batches may be added."""

    concept_confusion: Float[Array, "K C C"]
    concept_calibration: Float[Array, "K 3 num_bins"]
    concept_log_loss: Float[Array, "K 2"]
    task_confusion: Float[Array, "Y Y"]
    task_calibration: Float[Array, "3 num_bins"]
    task_log_loss: Float[Array, " 2"]
    num_examples: Int[Array, ""]


@jax.jit
def batch_sums(output: CBMOutput, batch: Batch) -> EvaluationSums:
    """Computes the sums of one batch; padding rows (weight 0) and missing (negative) concepts and labels add nothing.

    Args:
        output: The model's output for the batch.
        batch: The batch, with its labels and weights.

    Returns:
        Sums on the device; the concept fields have K = 0 for a model without concepts.
    """
    weight = jnp.asarray(batch.example_weight)
    concept_logits, label_logits = output.concept_logits, output.label_logits
    num_concepts, num_classes = concept_logits.shape[1:]

    def of_concept(
        logits: Float[Array, "B C"], target: Int[Array, " B"]
    ) -> tuple[Float[Array, "C C"], Float[Array, "3 num_bins"], Float[Array, " 2"]]:
        return (
            metrics.confusion(jnp.argmax(logits, axis=-1), target, weight, num_classes),
            metrics.calibration_sums(jax.nn.softmax(logits, axis=-1), target, weight),
            metrics.log_loss_sums(logits, target, weight),
        )

    if num_concepts:
        concept_sums = jax.vmap(of_concept, in_axes=1)(concept_logits.astype(jnp.float32), jnp.asarray(batch.concepts))
    else:
        shapes = ((num_classes, num_classes), (3, metrics.NUM_BINS), (2,))
        first, second, third = (jnp.zeros((0, *shape), jnp.float32) for shape in shapes)
        concept_sums = first, second, third
    label_logits = label_logits.astype(jnp.float32)
    label = jnp.asarray(batch.label)
    return EvaluationSums(
        *concept_sums,
        metrics.confusion(jnp.argmax(label_logits, axis=-1), label, weight, label_logits.shape[-1]),
        metrics.calibration_sums(jax.nn.softmax(label_logits, axis=-1), label, weight),
        metrics.log_loss_sums(label_logits, label, weight),
        jnp.sum(weight > 0),
    )


def evaluate(
    config: CBMConfig,
    arrays: ModelArrays,
    batches: Iterable[Batch],
    schema: Schema,
    *,
    forward_fn: ForwardFn | None = None,
) -> dict[str, Any]:
    """Scores a model on batches.

    The task is scored over rows with a label (>= 0) and each concept over its cells with a class (>= 0), both weighted
    by `example_weight`, so padding rows count for nothing. In the section `concept` all concept cells are pooled: the
    accuracy is the mean over concepts when no cell is missing, the F1 is not; `mean_accuracy` is the mean over
    concepts always. Its `majority_accuracy` is that of always predicting each concept's own most frequent class.

    Args:
        config: The model's static configuration.
        arrays: Parameters, masks (packed or not; None for a dense model) and heads; those of the strategy 'standard'
            have no concepts.
        batches: Batches with every row once. On several hosts, global arrays, so that the sums are those of all hosts.
        schema: Names of the concepts.
        forward_fn: Forward pass in place of `make_forward(config)`, for example one made for a mesh.

    Returns:
        Report: `num_examples`; `task` with `accuracy`, `macro_f1`, `paper_macro_f1`, `ece`, `log_loss`,
        `majority_accuracy`, `num` (the counted weight); `concept` with the same and `mean_accuracy`; and `concepts`
        with the same by name. The last two are absent where the model has no concepts. A number for which nothing was
        counted is None.

    Raises:
        ValueError: There are no batches, or the model's number of concepts is not the schema's.
    """
    forward = forward_fn or make_forward(config)
    if arrays.masks is not None and any(mask.dtype == jnp.bool_ for mask in arrays.masks.values()):
        arrays = arrays._replace(masks=_pack(arrays.masks))
    # Collected without waiting, then added in float64: the device never waits for the host, and sums over many batches
    # are exact.
    collected = [sharding.in_turn(batch_sums(forward(arrays, batch), batch)) for batch in batches]
    if not collected:
        raise ValueError("evaluate: expected at least one batch, got none (is the split empty?)")
    sums = EvaluationSums(
        *(
            np.sum([sharding.to_host(value).astype(np.float64) for value in values], axis=0)
            for values in zip(*collected, strict=True)
        )
    )
    return report_of(sums, schema)


def report_of(sums: EvaluationSums, schema: Schema) -> dict[str, Any]:
    """Turns added sums into the report that `evaluate` describes.

    Args:
        sums: Added outputs of `batch_sums`, on the host.
        schema: Names of the concepts, as many as the sums have (or the sums have none).

    Raises:
        ValueError: The sums have another number of concepts.
    """
    num_concepts = len(sums.concept_confusion)
    if num_concepts not in (0, len(schema.concepts)):
        raise ValueError(
            f"evaluate: the model has {num_concepts} concepts, expected the schema's {len(schema.concepts)}"
        )
    report: dict[str, Any] = {"num_examples": int(sums.num_examples)}
    if num_concepts:
        each = [
            _scores(*parts)
            for parts in zip(sums.concept_confusion, sums.concept_calibration, sums.concept_log_loss, strict=True)
        ]
        pooled = _scores(*(np.sum(part, axis=0) for part in sums[:3]))
        counts = np.asarray(sums.concept_confusion).sum(axis=2)
        pooled["majority_accuracy"] = float(counts.max(axis=1).sum() / counts.sum()) if counts.sum() else None
        accuracies = [scores["accuracy"] for scores in each if scores["accuracy"] is not None]
        pooled["mean_accuracy"] = float(np.mean(accuracies)) if accuracies else None
        report["concept"] = pooled
        report["concepts"] = dict(zip(schema.concepts, each, strict=True))
    report["task"] = _scores(sums.task_confusion, sums.task_calibration, sums.task_log_loss)
    return report


def _scores(confusion: ArrayLike, calibration: ArrayLike, log_loss: ArrayLike) -> dict[str, float | None]:
    scores = {
        "accuracy": metrics.accuracy(confusion),
        "macro_f1": metrics.macro_f1(confusion),
        "paper_macro_f1": metrics.paper_macro_f1(confusion),
        "ece": metrics.expected_calibration_error(calibration),
        "log_loss": metrics.log_loss(log_loss),
        "majority_accuracy": metrics.majority_accuracy(confusion),
    }
    counted = float(np.sum(np.asarray(confusion)))
    return {**(scores if counted else dict.fromkeys(scores)), "num": counted}
