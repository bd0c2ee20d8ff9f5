"""What a run ends with: scores of a split, the predictor that some strategies fit last, the model of the kept epoch."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sparsecbm_jax import evaluation, sharding
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.artifact import SparseCBM
from sparsecbm_jax.cbm import make_forward
from sparsecbm_jax.config import RunConfig, to_dict
from sparsecbm_jax.data.batches import Batch, Tokenized, eval_batches
from sparsecbm_jax.preparation import Prepared
from sparsecbm_jax.steps import TrainState, fit_predictor
from sparsecbm_jax.stopping import StopSignal


def _placed_batches(run: RunConfig, split: Tokenized, mesh: Mesh) -> Iterator[Batch]:
    batches = eval_batches(
        split,
        batch_size=run.training.eval_batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (sharding.put_batch(batch, mesh) for batch in batches)


def _until(stop: StopSignal, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        stop.check()
        yield batch


def score(
    run: RunConfig, prepared: Prepared, mesh: Mesh, state: TrainState, split: str, stop: StopSignal
) -> dict[str, Any]:
    """Scores a state on one split; see `evaluation.evaluate`. Raises `Preempted` where SIGTERM came."""
    return evaluation.evaluate(
        prepared.config,
        state.params,
        state.packed,
        state.heads,
        _until(stop, _placed_batches(run, prepared.splits[split], mesh)),
        prepared.dataset.schema,
        forward_fn=make_forward(prepared.config, mesh),
    )


def _with_predictor(run: RunConfig, prepared: Prepared, mesh: Mesh, state: TrainState) -> TrainState:
    """Second stage of 'independent' and 'sequential': φ on gold or on predicted activations."""
    train_split = prepared.splits["train"]
    classes = prepared.config.num_classes
    if run.strategy == "independent":
        # A missing cell (−1) activates no class.
        activations = np.asarray(jax.nn.one_hot(train_split.concepts, classes))
        labels = train_split.labels
    else:
        forward = make_forward(prepared.config, mesh)
        collected, gold = [], []
        for batch in _placed_batches(run, train_split, mesh):
            real = sharding.to_host(batch.example_weight) > 0
            collected.append(sharding.to_host(forward(state.params, None, state.heads, batch).activations)[real])
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


def kept_model(
    run: RunConfig, prepared: Prepared, mesh: Mesh, state: TrainState, meta: Mapping[str, Any], stop: StopSignal
) -> tuple[SparseCBM, dict[str, Any]]:
    """The model of the kept epoch, what is fitted last fitted, and its scores on validation and test."""
    if run.strategy in ("independent", "sequential"):
        state = _with_predictor(run, prepared, mesh, state)
    config, schema = prepared.config, prepared.dataset.schema
    metrics: dict[str, Any] = {
        "validation": score(run, prepared, mesh, state, "validation", stop),
        "test": score(run, prepared, mesh, state, "test", stop),
        "best_epoch": meta["best_epoch"],
        "train_seconds": meta["seconds"],
    }
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
    model = SparseCBM(config, state.params, masks, state.heads, schema, prepared.tokenizer, run.strategy, metadata)
    return model, metrics
