"""A model with all that is needed to use it, and the arrays that an edit may change."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sparsecbm_jax.backbones import maskable_paths
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import AnyMasks, Masks
from sparsecbm_jax.core.trees import Params
from sparsecbm_jax.data.batches import BUCKETS
from sparsecbm_jax.data.schema import Schema
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.mean_activations import MeanActivations, read_mean_activations
from sparsecbm_jax.model.reliability import Reliability, read_reliability

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_LENGTH = 512


class ModelArrays(NamedTuple):
    """The arrays of a model: all that training, pruning and corrections may change.

    Attributes:
        params: the backbone θ, layers stacked.
        masks: of all K concepts, {path: [K, ...]} booleans or packed bits, True where kept; None for a dense model.
        heads: projector ψ and label predictor φ, or the classifier of the strategy 'standard'.
    """

    params: Params
    masks: AnyMasks | None
    heads: Heads

    @property
    def concept_masks(self) -> AnyMasks:
        """Returns the masks of a model that has some.

        Raises:
            ValueError: if the model is dense.
        """
        masks_lib.check_masks(self.masks)
        assert self.masks is not None
        return self.masks


@dataclasses.dataclass(frozen=True, eq=False)
class SparseCBM:
    """A model with all that is needed to use it. Functions take one and return a new one; nothing changes it.

    Args:
        config: static shape.
        params: the backbone's parameters.
        masks: the K masks, or None for a dense model.
        heads: projector and predictor, or the classifier of the strategy 'standard'.
        schema: names of concepts, classes and labels.
        tokenizer: a fast tokeniser with a pad token.
        strategy: how it was trained: 'standard', 'independent', 'sequential', 'joint' or 'sparse'.
        metadata: JSON values kept with the model. Read here: 'max_length' (most tokens of a text), 'buckets' (widths
            that texts are padded to; for each, programs are compiled), 'mean_activations' and 'class_activations' (see
            `model.mean_activations`), 'reliability' (see `model.reliability`) and 'metrics' (kept in `metrics.json`).
            Shown on the card: 'seed', 'dataset', 'backbone' (names), 'functions' (names of a loss or criterion of one's
            own).
    """

    config: CBMConfig
    params: Params
    masks: Masks | None
    heads: Heads
    schema: Schema
    tokenizer: "PreTrainedTokenizerBase"
    strategy: str = "sparse"
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def arrays(self) -> ModelArrays:
        """Returns parameters, masks and heads, as functions on arrays take them."""
        return ModelArrays(self.params, self.masks, self.heads)

    def with_arrays(self, arrays: ModelArrays) -> "SparseCBM":
        """Returns the model with other arrays, without the scores of the former ones."""
        metadata = {key: value for key, value in self.metadata.items() if key != "metrics"}
        return dataclasses.replace(self, **arrays._asdict(), metadata=metadata)

    @property
    def max_length(self) -> int:
        """Returns the most tokens of a text, special tokens included; what is beyond is cut."""
        return min(int(self.metadata.get("max_length") or MAX_LENGTH), self.config.backbone.max_length)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Returns the widths that texts are padded to, rising; see `data.batches.bucket_length`."""
        return tuple(self.metadata.get("buckets") or BUCKETS)

    @property
    def mean_activations(self) -> MeanActivations | None:
        """Returns the means of the concepts' activations; None of models that do not know them.

        Raises:
            ValueError: if the metadata are not of the model's shape.
        """
        return read_mean_activations(self.metadata, self.config.num_concepts, self.config.num_classes)

    @property
    def reliability(self) -> Reliability:
        """Returns where the model's predictions are unsure.

        Raises:
            ValueError: if the metadata are not of the model's shape.
        """
        return read_reliability(self.metadata, self.config.num_concepts)

    @property
    def class_activations(self) -> Float[np.ndarray, "K C C"]:
        """Returns the activations that concept k is given where it is set to class c, at [k, c].

        Those that it has on average where the model reads it as c; of models that do not know them, one for c and zero
        for the other classes.
        """
        if (known := self.mean_activations) is not None:
            return known.by_class
        num_classes = self.config.num_classes
        return np.broadcast_to(np.eye(num_classes), (self.config.num_concepts, num_classes, num_classes))

    def for_few_texts(self) -> "SparseCBM":
        """Returns the same model with its layers looped over, for single texts and a few passes.

        Layers that are written out (`CBMConfig.unroll_layers`) run faster, but take several times longer to compile,
        for each width of texts, which so few passes never win back.
        """
        return dataclasses.replace(self, config=dataclasses.replace(self.config, unroll_layers=False))


def whole_masks(model: SparseCBM) -> Masks:
    """Returns masks that prune nothing."""
    return masks_lib.create(model.params, maskable_paths(model.config.backbone), model.config.num_concepts)
