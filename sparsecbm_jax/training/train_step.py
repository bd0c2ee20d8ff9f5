"""One training step: the state, the optimiser, the jitted update."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sparsecbm_jax.backbones import Backbone
from sparsecbm_jax.config.run_config import OptimConfig
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.masks import Packed
from sparsecbm_jax.core.trees import path_string
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.losses import LossFn, joint_loss, make_loss


class TrainState(NamedTuple):
    """Holds everything that training changes; arrays only.

    Attributes:
        step: optimiser steps done.
        params: the backbone θ, float32.
        heads: ψ and φ, float32.
        opt_state: optax state of {'backbone': params, 'heads': heads}.
        packed: bits of the K masks, or None while the model is dense.
    """

    step: Int[Array, ""]
    params: Any
    heads: Any
    opt_state: Any
    packed: Packed | None


@functools.lru_cache(maxsize=32)
def make_optimizer(config: OptimConfig, num_steps: int, events: tuple[int, ...] = ()) -> optax.GradientTransformation:
    """Makes Adam with one learning rate for the backbone and one for the heads, warm-up, decay and norm clipping.

    Args:
        config: rates and shape of the schedule; weight decay applies to kernels and embeddings only.
        num_steps: steps of the whole run.
        events: steps before which it prunes, rising.
    """
    of_sparse = config.learning_rate if config.sparse_learning_rate is None else config.sparse_learning_rate

    def adam(schedule: optax.Schedule) -> optax.GradientTransformation:
        if config.weight_decay == 0:
            return optax.adam(schedule)
        return optax.adamw(schedule, weight_decay=config.weight_decay, mask=_is_decayed)

    of_backbone = learning_rates(config, num_steps, events, config.learning_rate, of_sparse)
    of_heads = learning_rates(config, num_steps, events, config.head_learning_rate, config.head_learning_rate)
    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.multi_transform(
            {"backbone": adam(of_backbone), "heads": adam(of_heads)}, {"backbone": "backbone", "heads": "heads"}
        ),
    )


def learning_rates(
    config: OptimConfig, num_steps: int, events: tuple[int, ...], dense: float, sparse: float
) -> optax.Schedule:
    """Makes the schedule of a learning rate: warm-up and decay, once, or with `rewind` from each event to the next.

    Reference: Renda et al. 2020, 'Comparing Rewinding and Fine-tuning in Neural Network Pruning'.

    Args:
        config: the schedule's shape.
        num_steps: steps of the whole run.
        events: steps before which it prunes, rising.
        dense: peak up to the first event.
        sparse: peak from there on.
    """

    def of_part(num_steps: int, peak: float) -> optax.Schedule:
        warmup = max(1, round(config.warmup_fraction * num_steps))
        rest = max(1, num_steps - warmup)
        after = optax.linear_schedule(peak, 0.0, rest) if config.decay == "linear" else optax.constant_schedule(peak)
        # The first step already moves: it takes 1/warmup of the peak, not zero.
        return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), after], [warmup])

    if config.rewind:
        bounds = sorted({0, *events} - {num_steps})
        parts = [
            of_part(end - start, sparse if events and start >= events[0] else dense)
            for start, end in itertools.pairwise([*bounds, num_steps])
        ]
        return optax.join_schedules(parts, bounds[1:]) if len(parts) > 1 else parts[0]
    whole = of_part(num_steps, 1.0)
    if not events or dense == sparse:
        return of_part(num_steps, dense)
    return lambda step: whole(step) * jnp.where(step < events[0], dense, sparse)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients to g · min(1, max_norm / ‖g‖).

    As optax's, but that divides every element apart, which is an extra pass over all gradients.
    """

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        scale = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
        return jax.tree.map(lambda grad: grad * scale, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _is_decayed(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path_string(path).endswith(("kernel", "embedding")), tree)


def init_state(params: Any, heads: Any, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Makes a fresh dense state, every leaf placed by the path rules and the moments created where they will live."""
    params, heads = sharding.put(params, mesh), sharding.put(heads, mesh)
    trained = {"backbone": params, "heads": heads}
    specs = sharding.param_specs(jax.eval_shape(tx.init, trained))
    opt_state = jax.jit(tx.init, out_shardings=sharding.shardings(mesh, specs))(trained)
    step = jax.device_put(jnp.zeros((), jnp.int32), sharding.shardings(mesh, P()))
    return TrainState(step, params, heads, opt_state, None)


@functools.lru_cache(maxsize=32)
def make_train_step(
    config: CBMConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    loss_fn: LossFn = joint_loss,
    backbone: Backbone | None = None,
    dropout: bool = True,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Makes the jitted function (state, batch, rng) → (state, metrics), whose state is donated.

    Equal arguments give the same function, which is compiled once for every width of batches, dense and masked.

    Args:
        config: the model.
        tx: the optimiser from `make_optimizer`.
        mesh: where the state lies.
        loss_fn: the loss; `model.losses.joint_loss` by default.
        backbone: another backbone's three functions.
        dropout: False trains without noise.

    Returns:
        The function. `rng` is the run's key; the step number is folded into it. Metrics: the loss, its parts and the
        global norm of the gradients before clipping.
    """
    loss = make_loss(config, mesh, loss_fn, backbone)

    def train_step(state: TrainState, batch: Batch, rng: Array) -> tuple[TrainState, dict[str, Array]]:
        dropout_rng = jax.random.fold_in(rng, state.step) if dropout else None

        def of_trained(trained: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
            return loss(trained["backbone"], trained["heads"], state.packed, batch, dropout_rng)

        trained = {"backbone": state.params, "heads": state.heads}
        (value, parts), grads = jax.value_and_grad(of_trained, has_aux=True)(trained)
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **parts}
        return TrainState(state.step + 1, trained["backbone"], trained["heads"], opt_state, state.packed), metrics

    return jax.jit(train_step, donate_argnums=0)
