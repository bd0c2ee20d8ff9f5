"""Losses of the task, of the concepts, of both (Eq. 2), and of one subnetwork."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sparsecbm_jax.backbones import Backbone
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.sharding import SINGLE, Axes
from sparsecbm_jax.core.trees import Params
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.data.schema import MISSING
from sparsecbm_jax.model.config import CBMConfig, CBMOutput, Heads
from sparsecbm_jax.model.forward import batch_specs, forward, subnetwork_output
from sparsecbm_jax.model.sparse_cbm import ModelArrays

LossFn = Callable[[CBMConfig, CBMOutput, Batch, Axes], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def weighted_mean(
    values: Float[Array, "..."], weights: Float[Array, "..."], axes: Axes, over: tuple[str, ...]
) -> Float[Array, ""]:
    """Averages Σ w v / Σ w over this device's values and the mesh axes `over`; 0 where nothing weighs anything."""
    total, weight = jnp.sum(values * weights), jnp.sum(weights)
    if axes.is_manual:
        total, weight = jax.lax.psum((total, weight), over)
    return total / jnp.maximum(weight, 1.0)


def task_loss(
    config: CBMConfig, output: CBMOutput, batch: Batch, axes: Axes = SINGLE
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes CE(y, label) over rows that have a task label ('standard' strategy)."""
    weights = batch.example_weight * (batch.label >= 0)
    entropy = optax.softmax_cross_entropy_with_integer_labels(output.label_logits, jnp.maximum(batch.label, 0))
    loss = weighted_mean(entropy, weights, axes, sharding.ROW_AXES)
    return loss, {"task_loss": loss}


def concept_loss(
    config: CBMConfig, output: CBMOutput, batch: Batch, axes: Axes = SINGLE
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes mean_k CE(u_k, c_k) over cells that have a label (first stage of 'independent' and 'sequential')."""
    weights = batch.example_weight[:, None] * (batch.concepts >= 0)
    entropy = optax.softmax_cross_entropy_with_integer_labels(output.concept_logits, jnp.maximum(batch.concepts, 0))
    loss = weighted_mean(entropy, weights, axes, (*sharding.ROW_AXES, "concept"))
    return loss, {"concept_loss": loss}


def joint_loss(
    config: CBMConfig, output: CBMOutput, batch: Batch, axes: Axes = SINGLE
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes L_joint = CE(y, label) + γ · mean_k CE(u_k, c_k) (Eq. 1); Eq. 2 sums over k, which is K times this."""
    task, task_parts = task_loss(config, output, batch, axes)
    concept, concept_parts = concept_loss(config, output, batch, axes)
    return task + config.gamma * concept, {**task_parts, **concept_parts}


@dataclasses.dataclass(frozen=True)
class Distilled:
    """A joint loss of which a share is the distance from a teacher, on batches that have one.

    (1 − w) · L + w · T² · (KL(p̂ ‖ p) + γ · mean_k KL(p̂_k ‖ p_k)), with p = softmax(y / T) and p_k = softmax(u_k / T),
    and p̂ those of the teacher. Rows without labels count in the distance, too.

    Reference: Hinton et al. 2015, 'Distilling the Knowledge in a Neural Network'.

    Attributes:
        loss_fn: L.
        weight: w.
        temperature: T.
    """

    loss_fn: LossFn
    weight: float
    temperature: float

    def __call__(
        self, config: CBMConfig, output: CBMOutput, batch: Batch, axes: Axes = SINGLE
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Computes the loss and its parts; without a teacher, L."""
        loss, parts = self.loss_fn(config, output, batch, axes)
        if batch.teacher is None:
            return loss, parts
        task = self._distance(output.label_logits, batch.teacher.label)
        concepts = self._distance(output.concept_logits, batch.teacher.concepts)
        weights, over = jnp.asarray(batch.example_weight), sharding.ROW_AXES
        # Of every cell, whether it has a label or not.
        concept_weights = weights[:, None] * (batch.concepts >= MISSING)
        distance = weighted_mean(task, weights, axes, over) + config.gamma * weighted_mean(
            concepts, concept_weights, axes, (*over, "concept")
        )
        return (1 - self.weight) * loss + self.weight * distance, {**parts, "teacher_distance": distance}

    def _distance(self, logits: Float[Array, "*B C"], teacher: Float[Array, "*B C"]) -> Float[Array, "*B"]:
        log_p, log_of_teacher = (jax.nn.log_softmax(u / self.temperature) for u in (logits, teacher))
        divergence = jnp.sum(jnp.exp(log_of_teacher) * (log_of_teacher - log_p), axis=-1)
        return self.temperature**2 * divergence


def subnetwork_loss(
    config: CBMConfig,
    params: Params,
    heads: Heads,
    batch: Batch,
    kernels: Mapping[str, Float[Array, "..."]],
    concept: int | Int[Array, ""],
    activations: Float[Array, "B K C"],
) -> Float[Array, ""]:
    """Computes L_k = CE(y, label) + γ · CE(u_k, c_k) through subnetwork k; arguments as in `subnetwork_output`."""
    output = subnetwork_output(config, params, heads, batch, kernels, concept, activations)
    cells = jax.lax.dynamic_slice_in_dim(jnp.asarray(batch.concepts), concept, 1, axis=1)
    loss, _ = joint_loss(config, output, batch._replace(concepts=cells))
    return loss


def make_loss(
    config: CBMConfig, mesh: Mesh | None = None, loss_fn: LossFn = joint_loss, backbone: Backbone | None = None
) -> Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]:
    """Returns the function (params, heads, packed or None, batch, dropout_rng or None) → (loss, parts) on a mesh.

    On several devices its body is a fully manual `shard_map`: left to itself the partitioner masks before it gathers,
    so that weights travel K times, and reduces gradients K times.
    """
    axes = sharding.axes_of(mesh)

    def local(params: Params, heads: Heads, packed: Any, batch: Batch, dropout_rng: Any) -> Any:
        arrays = ModelArrays(params, packed, heads)
        output = forward(config, arrays, batch, dropout_rng=dropout_rng, axes=axes, backbone=backbone)
        return loss_fn(config, output, batch, axes)

    if not axes.is_manual:
        return local

    def sharded(params: Params, heads: Heads, packed: Any, batch: Batch, dropout_rng: Any) -> Any:
        specs = (
            sharding.param_specs(params),
            sharding.param_specs(heads),
            None if packed is None else sharding.packed_specs(packed),
            batch_specs("classifier" not in heads, has_teacher=batch.teacher is not None),
            None if dropout_rng is None else P(),
        )
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(params, heads, packed, batch, dropout_rng)

    return sharded


def least_margin(
    logits: Float[Array, "B C"], target: Int[Array, " B"], example_weight: Float[Array, " B"]
) -> Float[Array, ""]:
    """Computes the min over real rows of u_target − max_{c ≠ target} u_c.

    >>> import jax.numpy as jnp
    >>> float(least_margin(jnp.array([[1.0, 3.0, 2.0], [0.0, 9.0, 9.0]]), jnp.array([2, 0]), jnp.array([1.0, 0.0])))
    -1.0
    """
    return jnp.min(jnp.where(jnp.asarray(example_weight) > 0, margins(logits, target), jnp.inf))


def margins(logits: Float[Array, "B C"], target: Int[Array, " B"]) -> Float[Array, " B"]:
    """Computes u_target − max_{c ≠ target} u_c of every row."""
    is_target = jnp.arange(logits.shape[1])[None] == target[:, None]
    own = jnp.sum(jnp.where(is_target, logits, 0), axis=1)
    return own - jnp.max(jnp.where(is_target, -jnp.inf, logits), axis=1)
