"""The label predictor φ, fitted apart (strategies independent and sequential)."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sparsecbm_jax.core import sharding
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.heads import predict_label
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.training.setup import RunContext, placed_batches
from sparsecbm_jax.training.train_step import TrainState


def with_fitted_predictor(context: RunContext, state: TrainState) -> TrainState:
    """Fits φ on gold or on predicted activations, the second stage of 'independent' and 'sequential'."""
    run, config, train_split = context.settings, context.prepared.config, context.prepared.splits["train"]
    if STRATEGIES[run.strategy].predictor_inputs == "gold":
        # A missing cell (−1) activates no class.
        activations = np.asarray(jax.nn.one_hot(train_split.concepts, config.num_classes))
        labels = train_split.labels
    else:
        forward, arrays = make_forward(config, context.mesh), ModelArrays(state.params, None, state.heads)
        collected, gold = [], []
        for batch in placed_batches(context, "train"):
            real = sharding.to_host(batch.example_weight) > 0
            collected.append(sharding.to_host(forward(arrays, batch).activations)[real])
            gold.append(sharding.to_host(batch.label)[real])
        activations, labels = np.concatenate(collected), np.concatenate(gold)
    heads = fit_predictor(
        state.heads,
        activations,
        labels,
        learning_rate=run.optim.head_learning_rate,
        num_epochs=run.training.predictor_epochs,
        batch_size=run.training.batch_size,
        seed=run.seed,
    )
    return state._replace(heads=heads)


def fit_predictor(
    heads: Mapping[str, Any],
    activations: Float[np.ndarray, "N K C"],
    labels: Int[np.ndarray, " N"],
    *,
    learning_rate: float,
    num_epochs: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Trains φ alone on fixed activations (the second stage of 'independent' and 'sequential').

    Args:
        heads: heads whose predictor is trained; the projector is returned untouched.
        activations: gold one-hot concepts ('independent') or predicted σ(u) ('sequential').
        labels: task labels; rows with a negative one are left out.
        learning_rate: Adam's, constant.
        num_epochs: passes over the rows.
        batch_size: rows a step; the last few rows that do not fill a batch wait for the next epoch's order.
        seed: decides the order.

    Returns:
        New heads.

    Raises:
        ValueError: if no row has a label.
        AssertionError: if the activations' shape does not fit the predictor's or the labels'.
    """
    chex.assert_shape(activations, (len(labels), *heads["predictor"]["kernel"].shape[:2]), custom_message="activations")
    known = np.flatnonzero(labels >= 0)
    if not known.size:
        raise ValueError("the label predictor cannot be trained: no row of the train split has a task label")
    batch_size = min(batch_size, known.size)
    rng = np.random.default_rng([seed, 17])
    per_epoch = known.size // batch_size
    order = np.concatenate(
        [rng.permutation(known)[: per_epoch * batch_size].reshape(-1, batch_size) for _ in range(num_epochs)]
    )
    tx = optax.adam(learning_rate)

    def step(carry: Any, rows: Int[Array, " B"]) -> tuple[Any, None]:
        predictor, opt_state = carry

        def loss(candidate: Any) -> Float[Array, ""]:
            logits = predict_label({"predictor": candidate}, all_activations[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, all_labels[rows]).mean()

        updates, opt_state = tx.update(jax.grad(loss)(predictor), opt_state, predictor)
        return (optax.apply_updates(predictor, updates), opt_state), None

    all_activations, all_labels = jnp.asarray(activations), jnp.asarray(labels)
    start = (heads["predictor"], tx.init(heads["predictor"]))
    (predictor, _), _ = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows))(start, jnp.asarray(order))
    return {**heads, "predictor": predictor}
