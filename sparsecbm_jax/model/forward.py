"""The model: K masked passes of one backbone, the concept bottleneck, and the label.

text → z_k = pool(f_{θ_{M_k}}(x)) → u_k = z_k ψ_k + β_k → a_k = (u_k − mean u_k) / 10 → y = φ_0 + Σ_k a_k φ_k.

A backbone is three mask-ignorant functions, embed → layer → finish, and `encode` alone composes them: layers are
scanned outside, concepts run inside each layer, so a layer's weights and the bits of its K masks are gathered once
and every concept uses that copy. Dense models, one concept, K concepts, Fisher gradients, token gradients and
interventions are this same composition with other masks and another argument differentiated.

Reference: Tan et al. 2024, Eq. 1 to 3.
Deviation: cross-entropy of the concepts takes u, not σ(u): a softmax over σ(u) cannot fall below about 0.55 for three
classes. z is the mean over real tokens, not over padding. The label reads centred logits; see `heads.activate`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.sharding import SINGLE
from sparsecbm_jax.core.trees import Params
from sparsecbm_jax.data.batches import Batch, TeacherLogits
from sparsecbm_jax.model.config import CBMConfig, CBMOutput, Heads, Kernels
from sparsecbm_jax.model.encode import encode
from sparsecbm_jax.model.heads import activate, predict_label, project
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.model.subnetwork_weights import SubnetworkWeights


def forward(
    config: CBMConfig, arrays: ModelArrays, batch: Batch, *, kernels: Kernels | None = None, **encode_args: Any
) -> CBMOutput:
    """Runs the whole model, text to label (Eq. 1 and 3).

    Args:
        config: the model's static description.
        arrays: parameters, masks and heads; without masks the dense model runs, one pass for all concepts.
        batch: texts of any labels, which are not read.
        kernels: effective kernels of every concept, {path: [K, ...]}, in place of masked parameters.
        **encode_args: as for `encode`.
    """
    params, masks, heads = arrays
    axes = encode_args.get("axes", SINGLE)
    z = encode(config, SubnetworkWeights(params, masks, kernels), batch, **encode_args)
    if "classifier" in heads:
        logits = z[:, 0] @ heads["classifier"]["kernel"] + heads["classifier"]["bias"]
        empty = jnp.zeros((z.shape[0], 0, config.num_classes), z.dtype)
        return CBMOutput(empty, empty, logits, z)
    u = project(heads, z)
    activations = activate(config, u)
    return CBMOutput(u, activations, predict_label(heads, activations, axes), z)


def subnetwork_output(
    config: CBMConfig,
    params: Params,
    heads: Heads,
    batch: Batch,
    kernels: Mapping[str, Float[Array, "..."]],
    concept: int | Int[Array, ""],
    activations: Float[Array, "B K C"],
) -> CBMOutput:
    """Runs subnetwork k alone, the other concepts' activations held as they are.

    Args:
        config: the model's static description.
        params: the backbone θ, whose maskable kernels are not read.
        heads: projector ψ and label predictor φ.
        batch: texts of any labels, which are not read.
        kernels: {path: array} effective kernels of subnetwork k, without a concept axis; differentiate wrt these.
        concept: k; may be traced.
        activations: a of all concepts at the current masks; entry k is computed again.

    Returns:
        u and z of concept k alone (K = 1), the activations of all concepts, and the label that follows from them.
    """
    alone = {path: kernel[None] for path, kernel in kernels.items()}
    z = encode(config, SubnetworkWeights(params, kernels=alone), batch)
    projector = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, concept, 0), heads["projector"])
    u = project({"projector": projector}, z)
    others = jax.lax.stop_gradient(activations)
    mixed = jax.lax.dynamic_update_index_in_dim(others, activate(config, u[:, 0]), concept, 1)
    return CBMOutput(u, mixed, predict_label(heads, mixed), z)


def batch_specs(has_concepts: bool, *, has_teacher: bool = False) -> Batch:
    """Returns how a batch is spread over a mesh; without concepts its cells go with the rows."""
    rows: Any = sharding.BATCH_SPEC
    cells: Any = P(sharding.ROW_AXES, "concept") if has_concepts else rows
    teacher = TeacherLogits(cells, rows) if has_teacher else None
    return Batch(rows, rows, concepts=cells, label=rows, example_weight=rows, row_ids=rows, teacher=teacher)


@functools.lru_cache(maxsize=32)
def make_forward(config: CBMConfig, mesh: Mesh | None = None) -> Callable[..., CBMOutput]:
    """Returns the jitted function (arrays, batch) → CBMOutput in inference mode, on a mesh."""
    axes = sharding.axes_of(mesh)

    def local(arrays: ModelArrays, batch: Batch) -> CBMOutput:
        return forward(config, arrays, batch, axes=axes)

    if not axes.is_manual:
        return jax.jit(local)

    def sharded(arrays: ModelArrays, batch: Batch) -> CBMOutput:
        params, packed, heads = arrays
        if packed is not None and any(mask.dtype == jnp.bool_ for mask in packed.values()):
            packed = masks_lib.pack(packed)
        rows, by_concept = sharding.BATCH_SPEC, P(sharding.ROW_AXES, "concept")
        is_standard = "classifier" in heads
        concepts = rows if is_standard else by_concept
        specs = ModelArrays(
            sharding.param_specs(params),
            None if packed is None else sharding.packed_specs(packed),  # type: ignore[arg-type]
            sharding.param_specs(heads),
        )
        arrays = ModelArrays(params, packed, heads)
        out = CBMOutput(concepts, concepts, rows, rows if packed is None else by_concept)  # type: ignore[arg-type]
        in_specs = (specs, batch_specs(not is_standard))
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out)(arrays, batch)

    return jax.jit(sharded)


def concept_output(
    config: CBMConfig,
    params: Params,
    heads: Heads,
    batch: Batch,
    kernels: Mapping[str, Float[Array, "..."]],
    concept: Int[Array, ""],
) -> CBMOutput:
    """Runs subnetwork k for its own concept; the label would depend on the other concepts, which are left out."""
    others = jnp.zeros((batch.input_ids.shape[0], config.num_concepts, config.num_classes))
    return subnetwork_output(config, params, heads, batch, kernels, concept, others)


@functools.partial(jax.jit, static_argnums=0)
def concept_logits(
    config: CBMConfig, arrays: ModelArrays, batch: Batch, concept: int | Int[Array, ""]
) -> Float[Array, "B C"]:
    """Returns u_k of a batch, from one pass through subnetwork k."""
    kernels = masks_lib.kernels_of(arrays.params, masks_lib.concept(arrays.concept_masks, concept))
    output = concept_output(config, arrays.params, arrays.heads, batch, kernels, jnp.asarray(concept))
    return output.concept_logits[:, 0]
