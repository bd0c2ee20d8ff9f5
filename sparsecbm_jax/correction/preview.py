"""The effect of an edit before it is applied: on its text, on a sample of other texts, on concepts and the label."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.sharding import in_turn
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig, CBMOutput
from sparsecbm_jax.model.forward import make_forward, subnetwork_output
from sparsecbm_jax.model.sparse_cbm import ModelArrays


@dataclasses.dataclass(frozen=True)
class SampleEffect:
    """The effect of one concept's edit on a sample of texts. It does not affect other concepts: their masks stay.

    Attributes:
        num_texts: Texts in the sample.
        flips: [C, C], texts whose concept is predicted as the first class before and as the second after.
        label_flips: [Y, Y], the same for the label.
        shift: Mean total variation distance between the concept's probabilities before and after, in [0, 1].
        changed_rows: `row_ids` of texts whose concept is predicted as another class.
        num_repaired, num_broken: Texts with a gold class that are predicted correctly only after, and only before.
    """

    num_texts: int
    flips: Int[np.ndarray, "C C"]
    label_flips: Int[np.ndarray, "Y Y"]
    shift: float
    changed_rows: tuple[int, ...]
    num_repaired: int
    num_broken: int

    @property
    def num_changed(self) -> int:
        """Number of texts whose concept is predicted as another class."""
        return len(self.changed_rows)

    @property
    def num_labels_changed(self) -> int:
        """Number of texts whose label is predicted as another."""
        return int(self.label_flips.sum() - np.trace(self.label_flips))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        plain = {name: value.tolist() for name, value in (("flips", self.flips), ("label_flips", self.label_flips))}
        return {**dataclasses.asdict(self), **plain, "changed_rows": list(self.changed_rows)}


def outputs_of(config: CBMConfig, arrays: ModelArrays, batches: Iterable[Batch]) -> list[tuple[Batch, CBMOutput]]:
    """Runs the model on a sample, once for many previews, which compare with these outputs."""
    forward = make_forward(config)
    return [(batch, in_turn(forward(arrays, batch))) for batch in batches]


def preview(
    config: CBMConfig, arrays: ModelArrays, sample: Iterable[tuple[Batch, CBMOutput]], concept: int
) -> SampleEffect:
    """Compares a concept's subnetwork under new masks with the outputs of the model before.

    Args:
        config: The model's static description.
        arrays: Arrays with the edited masks, which are the only difference from the model of `sample`.
        sample: Batches and outputs, from `outputs_of`; rows with a weight of 0 do not count.
        concept: Index of the edited concept. Only its subnetwork is run: a K-th of the work of running the model.

    Raises:
        ValueError: The sample is empty.
    """
    flips = np.zeros((config.num_classes,) * 2, int)
    label_flips = np.zeros((config.num_labels,) * 2, int)
    distances: list[Float[np.ndarray, " n"]] = []
    rows: list[int] = []
    num_repaired = num_broken = 0
    for batch, before in sample:
        after = _subnetwork(config, arrays, batch, jnp.int32(concept), before.activations)
        real = np.asarray(batch.example_weight) > 0
        old, new = np.asarray(before.concept_logits)[real, concept], np.asarray(after.concept_logits)[real, 0]
        was, now, gold = old.argmax(-1), new.argmax(-1), np.asarray(batch.concepts)[real, concept]
        np.add.at(flips, (was, now), 1)
        labels = [np.asarray(output.label_logits)[real].argmax(-1) for output in (before, after)]
        np.add.at(label_flips, tuple(labels), 1)
        distances.append(0.5 * np.abs(_softmax(old) - _softmax(new)).sum(-1))
        rows += np.asarray(batch.row_ids)[real][was != now].tolist()
        num_repaired += int(np.sum((was != gold) & (now == gold)))
        num_broken += int(np.sum((was == gold) & (now != gold)))
    if not distances:
        raise ValueError("the sample has no texts; expected at least one batch")
    shifts = np.concatenate(distances)
    return SampleEffect(len(shifts), flips, label_flips, float(shifts.mean()), tuple(rows), num_repaired, num_broken)


@functools.partial(jax.jit, static_argnums=0)
def _subnetwork(
    config: CBMConfig,
    arrays: ModelArrays,
    batch: Batch,
    concept: Int[Array, ""],
    activations: Float[Array, "B K C"],
) -> CBMOutput:
    kernels = masks_lib.kernels_of(arrays.params, masks_lib.concept(arrays.concept_masks, concept))
    return subnetwork_output(config, arrays.params, arrays.heads, batch, kernels, concept, activations)


def _softmax(logits: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "n C"]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
