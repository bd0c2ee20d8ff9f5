"""The model's static description, and the types of its output and heads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.config.run_config import ACTIVATIONS, RunConfig
from sparsecbm_jax.data.schema import Schema

Heads = Mapping[str, Mapping[str, Any]]
Kernels = Mapping[str, Float[Array, "K ..."]]


REMAT_POLICIES: Mapping[str, Callable[..., Any] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


@dataclass(frozen=True)
class CBMConfig:
    """The static description of a concept-bottleneck model.

    Attributes:
        backbone: the encoder or decoder.
        num_concepts: K.
        num_classes: C, classes of every concept.
        num_labels: Y, classes of the task.
        dtype: matmuls' type, 'float32' or 'bfloat16'; parameters, norms, softmax, pooling and heads stay float32.
        remat: what of a layer is computed again in the backward pass instead of being kept: nothing ('none'), all but
            what its kernels give ('selective'), or everything ('full').
        unroll_layers: on one device, write the layers out instead of looping: compiles several times longer, and on CPU
            runs about a quarter faster.
        gamma: γ, the weight of the concept loss in Eq. 1.
        activation: what the label reads of a concept, 'log_odds', 'centred' or 'sigmoid'; see `model.heads.activate`.
    """

    backbone: BackboneConfig
    num_concepts: int
    num_classes: int
    num_labels: int
    dtype: str = "float32"
    remat: str = "none"
    unroll_layers: bool = False
    gamma: float = 5.0
    activation: str = "log_odds"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; expected one of {', '.join(map(repr, ACTIVATIONS))}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; expected one of {', '.join(map(repr, REMAT_POLICIES))}")

    @classmethod
    def of_run(
        cls, run: RunConfig, backbone: BackboneConfig, schema: Schema, *, unroll_layers: bool = False
    ) -> "CBMConfig":
        """Returns the description of the model that a run trains.

        Args:
            run: its settings.
            backbone: the pretrained backbone, whose dropout rates the settings may replace.
            schema: of the data.
            unroll_layers: see `CBMConfig`.
        """
        if (rate := run.backbone.dropout) is not None:
            backbone = replace(backbone, dropout=rate, attention_dropout=rate)
        return cls(
            backbone,
            num_concepts=schema.num_concepts,
            num_classes=schema.num_classes,
            num_labels=schema.num_labels,
            dtype=run.backbone.dtype,
            remat=run.backbone.remat,
            unroll_layers=unroll_layers,
            gamma=run.gamma,
            activation=run.predictor.activation,
        )


class CBMOutput(NamedTuple):
    """The output of one pass; with the 'standard' strategy (no bottleneck) the concept fields have K = 0.

    Attributes:
        concept_logits: u_k.
        activations: a_k, of `model.heads.activate`.
        label_logits: y.
        pooled: z_k; one entry for a dense model, whose concepts share a pass.
    """

    concept_logits: Float[Array, "B K C"]
    activations: Float[Array, "B K C"]
    label_logits: Float[Array, "B Y"]
    pooled: Float[Array, "B P D"]
