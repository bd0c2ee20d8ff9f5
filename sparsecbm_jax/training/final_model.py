"""A run's end: scores of a split, the predictor that some strategies fit last, the model of the best epoch."""

from collections.abc import Iterator
from typing import Any

from sparsecbm_jax.config.run_config import to_dict
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.evaluation import scores
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.runtime.preemption import StopSignal
from sparsecbm_jax.training.label_predictor import describe_finish, finish_heads, mean_activations_of, reliability_of
from sparsecbm_jax.training.metrics_log import print_once
from sparsecbm_jax.training.setup import RunContext, placed_batches
from sparsecbm_jax.training.train_step import TrainState


def _until(stop: StopSignal, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        stop.check()
        yield batch


def score(context: RunContext, state: TrainState, split: str) -> dict[str, Any]:
    """Scores a state on one split; see `evaluation.evaluate`.

    Raises:
        Preempted: SIGTERM came.
    """
    config = context.prepared.config
    return scores.evaluate(
        config,
        ModelArrays(state.params, state.packed, state.heads),
        _until(context.stop, placed_batches(context, split)),
        context.prepared.dataset.schema,
        forward_fn=make_forward(config, context.mesh),
    )


def final_model(
    context: RunContext, state: TrainState, *, best_epoch: int, seconds: float
) -> tuple[SparseCBM, dict[str, Any]]:
    """Makes the run's model of the best epoch's state, and scores it on validation and test.

    Concepts are calibrated and the label predictor is fitted here; see `label_predictor.finish_heads`.

    Args:
        context: the run.
        state: the best epoch's.
        best_epoch: its number, from 0.
        seconds: time spent on training.

    Returns:
        The model, and its metrics.

    Raises:
        Preempted: SIGTERM came.
    """
    run, prepared = context.settings, context.prepared
    config, schema = prepared.config, prepared.dataset.schema
    # With the φ of training, where training has one: of the other, validation is no judge.
    validation = None if STRATEGIES[run.strategy].predictor_inputs else score(context, state, "validation")
    state, finished = finish_heads(context, state)
    metrics: dict[str, Any] = {
        "validation": validation or score(context, state, "validation"),
        "test": score(context, state, "test"),
        "best_epoch": best_epoch,
        "train_seconds": seconds,
    }
    if finished:
        metrics["predictor"] = finished
        print_once(describe_finish(finished))
    masks = None if state.packed is None else masks_lib.unpack(state.packed, config.num_concepts)
    if masks is not None:
        metrics["density"] = dict(zip(schema.concepts, masks_lib.total_density(masks).tolist(), strict=True))
    metadata = {
        "seed": run.seed,
        "dataset": prepared.dataset.name,
        "backbone": run.backbone.name,
        "max_length": run.data.max_length,
        "metrics": metrics,
        "run_config": to_dict(run),
    }
    if STRATEGIES[run.strategy].has_bottleneck:
        metadata |= mean_activations_of(context, state).to_metadata()
        metadata |= reliability_of(context, state).to_metadata()
    if context.functions:
        metadata["functions"] = context.functions
    model = SparseCBM(config, state.params, masks, state.heads, schema, prepared.tokenizer, run.strategy, metadata)
    return model, metrics
